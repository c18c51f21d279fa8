"""SRA 2 on LightningDiT-B/1 and VA-VAE latents, see lightning_b.py.

Command: python main.py --config=configs/sra2_lightning_b.py --config.data.dir=LATENTS
Nobody has published this. Not yet run.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_lightning, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_lightning_b"
    c.steps = 100_000
    set_size(c, "B")
    set_lightning(c)
    return c
