"""SRA 2 on SiT-B/2 with logit-normal times, ImageNet 256 px, see sit_b_lognormal.py.

Command: python main.py --config=configs/sra2_b_lognormal.py --config.data.dir=LATENTS
Nobody has published whether SRA 2 adds to these times. Not yet run.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sra2_b_lognormal"
    c.steps = 400_000
    set_size(c, "B")
    c.transport.time = "lognormal"
    return c
