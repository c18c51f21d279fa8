"""SRA 2 on SiT-B/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_b.py --config.data.dir=LATENTS
Published (paper): FID-50K 28.9 after 400K steps without guidance, SiT-B/2 33.0.
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_b"
    c.steps = 400_000
    set_size(c, "B")
    return c
