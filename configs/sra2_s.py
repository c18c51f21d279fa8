"""SRA 2 on SiT-S/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_s.py --config.data.dir=LATENTS
No published number; depth 2 as for B, whose depth in layers it shares.
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_s"
    c.steps = 400_000
    set_size(c, "S")
    return c
