"""SRA on SiT-XL/2, ImageNet 256 px (arXiv 2505.02831).

Command: python main.py --config=configs/sra_xl.py --config.data.dir=LATENTS
Block 8 aligned with block 20 of the EMA network, weight 0.2 until epoch 149, then a
tenth every 1,000 epochs. Published: FID-50K 1.58 with guidance after 800 epochs.
Since July 2026 the authors' code has another default: config.align.teacher.loss
cosine_tokens (theirs, over the tokens) or cosine (over channels), weight 0.5, schedule
constant. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra_xl"
    c.align.vae.enabled = False
    c.align.teacher.enabled = True
    return c
