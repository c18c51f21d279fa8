"""REPA and SRA 2 together on SiT-B/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/repa_sra2_b.py --config.data.dir=LATENTS
Needs a dataset encoded with --store_images, or --config.align.encoder.source=features
and one encoded with --encoder=facebook/dinov2-base.
REPA at block 4, SRA 2 at block 2; not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "repa_sra2_b"
    c.steps = 400_000
    set_size(c, "B")
    c.align.encoder.enabled = True
    return c
