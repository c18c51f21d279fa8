"""iREPA on SiT-B/2, ImageNet 256 px (arXiv 2512.10794).

Command: python main.py --config=configs/irepa_b.py --config.data.dir=LATENTS
Needs a dataset encoded with --store_images, or --config.align.irepa.source=features and
one encoded with --encoder=facebook/dinov2-base. Block 4, as REPA's at this size.
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "irepa_b"
    c.steps = 400_000
    set_size(c, "B")
    c.align.vae.enabled = False
    c.align.irepa.enabled = True
    c.align.irepa.depth = 4
    return c
