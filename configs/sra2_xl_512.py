"""SRA 2 on SiT-XL/2, ImageNet 512 px: 64x64 latents, 1,024 tokens.

Command: python main.py --config=configs/sra2_xl_512.py --config.data.dir=LATENTS
The paper's digest gives no 512 px number; settings as at 256 px.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_xl_512"
    c.data.resolution = 512
    c.latents.size = 64
    return c
