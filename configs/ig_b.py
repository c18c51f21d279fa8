"""Internal Guidance on SiT-B/2, ImageNet 256 px (arXiv 2512.24176), see ig_xl.py.

Command: python main.py --config=configs/ig_b.py --config.data.dir=LATENTS
Block 4 of 12, a choice of ours. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import INTERNAL_GUIDANCE, default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "ig_b"
    c.steps = 400_000
    set_size(c, "B")
    c.align.vae.update(INTERNAL_GUIDANCE)
    c.align.vae.depth = 4
    return c
