"""REPA on MMDiT, MS-COCO 2014, text to image, 256 px (arXiv 2410.06940).

Command: python main.py --config=configs/repa_mmdit_coco.py --config.data.dir=COCO
Needs a dataset encoded with --store_images besides, or align.encoder.source=features
and one encoded with --encoder=facebook/dinov2-base. Published, as SRA 2 prints it: FID
4.73 after 150K steps, guidance 2. Not yet reproduced with this code.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    vanilla = Path(__file__).with_name("mmdit_coco.py")
    c: ConfigDict = runpy.run_path(str(vanilla))["get_config"]()
    c.name = "repa_mmdit_coco"
    c.align.encoder.enabled = True
    c.align.encoder.depth = 8
    return c
