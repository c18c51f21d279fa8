"""SRA 2 on scikit-learn's 1,797 digits of 8x8 pixels: tests and small comparisons.

Command: python main.py --config=configs/digits.py. A small SiT on the 4x4x4 latents of
a small VAE shipped with the package (sra2_jax/assets/digits_vae), 16 tokens. Its
numbers are proxies on held-out digits, not FID, and at this size the paper's gain is
neither expected nor claimed.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    c = default()
    c.name = "digits"
    c.steps = 1500
    c.batch_size = 64
    c.data.images = "digits"
    c.data.resolution = 32
    c.data.num_classes = 10
    c.data.shuffle_buffer = 2048
    c.vae = "digits"
    c.latents.size = 4
    c.latents.scaling_factor = 0.975897
    c.model.width, c.model.depth, c.model.heads = 96, 6, 4
    c.model.patch_size = 1
    c.model.scan = False
    c.model.remat = "none"
    c.model.dtype = "float32"
    c.align.vae.depth = 2
    c.align.encoder.depth = 2
    c.align.encoder.model = "digits"
    c.align.encoder.width = 64
    c.align.encoder.head_width = 192
    c.align.irepa.depth = 2
    c.align.irepa.model = "digits"
    c.align.irepa.width = 64
    c.align.teacher.depth, c.align.teacher.teacher_depth = 2, 4
    c.align.teacher.schedule = "constant"
    c.optim.learning_rate = 2e-3
    c.ema_decay = 0.99
    c.sampling.steps = 50
    c.sampling.labels = "balanced"
    c.sampling.batch_size = 128
    c.run.log_every = 10
    c.run.checkpoint_every = 500
    c.run.sample_every = 300
    c.run.grid_classes = 10
    c.run.grid_columns = 10
    c.eval.features = "digits"
    c.eval.every = 300
    c.eval.num_samples = 360
    return c
