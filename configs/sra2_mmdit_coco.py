"""SRA 2 on MMDiT, MS-COCO 2014, text to image, 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_mmdit_coco.py --config.data.dir=COCO
Published: FID 4.67, PickScore 20.92 after 150K steps, guidance 2. The aligned block is
not published: 8, as REPA's. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_mmdit


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_mmdit_coco"
    set_mmdit(c)
    return c
