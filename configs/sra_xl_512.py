"""SRA on SiT-XL/2, ImageNet 512 px (arXiv 2505.02831).

Command: python main.py --config=configs/sra_xl_512.py --config.data.dir=LATENTS
As at 256 px, but the weight falls from epoch 99, tenfold in 800. Not yet reproduced
with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_align import EPOCH
from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra_xl_512"
    c.data.resolution = 512
    c.latents.size = 64
    c.align.vae.enabled = False
    c.align.teacher.enabled = True
    c.align.teacher.schedule_start = 99 * EPOCH
    c.align.teacher.schedule_steps = 800 * EPOCH
    return c
