"""Vanilla SiT-B/2 with logit-normal times, ImageNet 256 px: the free baseline.

Command: python main.py --config=configs/sit_b_lognormal.py --config.data.dir=LATENTS
Times are sigmoid(N(0, 1)), as in SD3 (arXiv 2403.03206). Published by others
(willisma/diffuse_nnx, 80 epochs, Heun with 32 steps): FID-50K 29.35, uniform times
34.49 in the same code. Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default, set_size


def get_config() -> ConfigDict:
    c = default()
    c.name = "sit_b_lognormal"
    c.steps = 400_000
    set_size(c, "B")
    c.align.vae.enabled = False
    c.transport.time = "lognormal"
    return c
