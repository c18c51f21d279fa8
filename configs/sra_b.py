"""SRA on SiT-B/2, ImageNet 256 px (arXiv 2505.02831).

Command: python main.py --config=configs/sra_b.py --config.data.dir=LATENTS
Blocks 3 and 8, as in the authors' script. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra_b"
    c.steps = 400_000
    set_size(c, "B")
    c.align.vae.enabled = False
    c.align.teacher.enabled = True
    return c
