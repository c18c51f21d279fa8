"""SRA 2 on MMDiT, MS-COCO 2014, text to image, 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_mmdit_coco.py --config.data.dir=COCO
Published: FID 4.67, PickScore 20.92 after 150K steps, guidance 2. The aligned block is
not published: 8, as REPA's. Not yet reproduced with this code.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    vanilla = Path(__file__).with_name("mmdit_coco.py")
    c: ConfigDict = runpy.run_path(str(vanilla))["get_config"]()
    c.name = "sra2_mmdit_coco"
    c.align.vae.enabled = True
    c.align.vae.depth = 8
    return c
