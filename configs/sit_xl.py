"""Vanilla SiT-XL/2, ImageNet 256 px: the baseline, no alignment (arXiv 2401.08740).

Command: python main.py --config=configs/sit_xl.py --config.data.dir=LATENTS
Published: FID-50K 8.3 after 7M steps, 250-step SDE without guidance, by SiT's own
recipe: no clipping of gradients, images flipped at random. This is REPA's recipe for
SiT: clipped at norm 1, no flips. For SiT's own encode the latents with --mirror and set
--config.optim.clip_norm=1e9. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "sit_xl"
    c.steps = 7_000_000
    c.align.vae.enabled = False
    return c
