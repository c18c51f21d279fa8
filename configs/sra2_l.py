"""SRA 2 on SiT-L/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_l.py --config.data.dir=LATENTS
Published (paper): FID-50K 14.3 after 400K steps without guidance, SiT-L/2 18.8.
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_l"
    c.steps = 400_000
    set_size(c, "L")
    return c
