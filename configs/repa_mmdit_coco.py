"""REPA on MMDiT, MS-COCO 2014, text to image, 256 px (arXiv 2410.06940).

Command: python main.py --config=configs/repa_mmdit_coco.py --config.data.dir=COCO
Needs a dataset encoded with --store_images besides, or align.encoder.source=features
and one encoded with --encoder=facebook/dinov2-base. Published, as SRA 2 prints it: FID
4.73 after 150K steps, guidance 2. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_mmdit


def get_config() -> ConfigDict:
    c = default()
    c.name = "repa_mmdit_coco"
    set_mmdit(c)
    c.align.vae.enabled = False
    c.align.encoder.enabled = True
    return c
