"""REPA and SRA 2 together on SiT-XL/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/repa_sra2_xl.py --config.data.dir=LATENTS
Needs a dataset encoded with --store_images, or --config.align.encoder.source=features
and one encoded with --encoder=facebook/dinov2-base.
Both at block 8 with their own weights. Published: FID-50K lower than REPA's by 3.1, 1.9
and 1.1 after 100K, 200K and 400K steps. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "repa_sra2_xl"
    c.align.encoder.enabled = True
    return c
