"""The embedded default: SRA 2 on 5,000 handwritten digits of MNIST, minutes on a CPU.

Command: python main.py. The small SiT of configs/digits.py on the 8x8x4 latents of a
VAE shipped with the package (sra2_jax/assets/mnist_vae), in patches of 2: 16 tokens.
Its numbers are proxies on held-out digits, not FID, and at this size the paper's gain
is neither expected nor claimed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    digits = Path(__file__).with_name("digits.py")
    c: ConfigDict = runpy.run_path(str(digits))["get_config"]()
    c.name = "quickstart"
    c.data.images = c.vae = c.eval.features = "mnist"
    c.data.shuffle_buffer = 8192
    c.latents.size, c.model.patch_size = 8, 2
    c.latents.scaling_factor = 1.110465
    c.sampling.guidance = 1.5
    c.steps = 1000
    c.run.checkpoint_every = c.run.sample_every = c.eval.every = 500
    c.eval.num_samples = 500
    return c
