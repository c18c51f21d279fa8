"""LightningDiT-B/1 on VA-VAE latents, ImageNet 256 px, see lightning_xl.py.

Command: python main.py --config=configs/lightning_b.py --config.data.dir=LATENTS
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_lightning, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "lightning_b"
    c.steps = 100_000
    set_size(c, "B")
    set_lightning(c)
    c.align.vae.enabled = False
    return c
