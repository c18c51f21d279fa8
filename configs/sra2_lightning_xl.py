"""SRA 2 on LightningDiT-XL/1 and VA-VAE latents, see lightning_xl.py.

Command: python main.py --config=configs/sra2_lightning_xl.py --config.data.dir=LATENTS
Nobody has published this. Not yet run.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_lightning


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_lightning_xl"
    c.steps = 1_000_000
    set_lightning(c)
    return c
