"""REPA on SiT-XL/2, ImageNet 256 px (arXiv 2410.06940).

Command: python main.py --config=configs/repa_xl.py --config.data.dir=LATENTS
Needs a dataset encoded with --store_images, or --config.align.encoder.source=features
and one encoded with --encoder=facebook/dinov2-base.
Published: FID-50K 1.42 with guidance after 4M steps. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "repa_xl"
    c.align.vae.enabled = False
    c.align.encoder.enabled = True
    return c
