"""MMDiT on MS-COCO 2014, text to image, 256 px, as REPA's (arXiv 2410.06940).

Command: python main.py --config=configs/mmdit_coco.py --config.data.dir=COCO
docs/text_to_image.md says how COCO is made. Published, as SRA 2 prints it: FID 5.08,
PickScore 20.54 after 150K steps, guidance 2. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "mmdit_coco"
    c.steps = 150_000
    c.text.encoder = "openai/clip-vit-large-patch14"
    c.data.num_classes = 1
    c.model.width, c.model.depth, c.model.heads = 768, 24, 24
    c.align.vae.enabled = False
    c.sampling.guidance = 2.0
    return c
