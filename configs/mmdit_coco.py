"""MMDiT on MS-COCO 2014, text to image, 256 px, as REPA's (arXiv 2410.06940).

Command: python main.py --config=configs/mmdit_coco.py --config.data.dir=COCO
docs/text_to_image.md says how COCO is made. Published, as SRA 2 prints it: FID 5.08,
PickScore 20.54 after 150K steps, guidance 2. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_mmdit


def get_config() -> ConfigDict:
    c = default()
    c.name = "mmdit_coco"
    set_mmdit(c)
    c.align.vae.enabled = False
    return c
