"""Train the small autoencoder that is shipped with the project.

    python -m tools.train_digits_vae --out DIR

fits an AutoencoderKL to the train part of scikit-learn's digits (32x32x3 -> 4x4x4) and
writes DIR/config.json, DIR/diffusion_pytorch_model.safetensors (float16) and
DIR/README.md with the figures measured on the 360 held-out digits. Some minutes on two
CPU cores, about 1.5 GB of memory.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.svm import SVC

from sra2_jax.command import run_program
from sra2_jax.data.digits import load_digits, to_grey
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.weights import load_vae
from sra2_jax.weights.vae import FORMAT
from tools import train_vae
from tools.digits import run
from tools.minimise import SEED, halved

CONFIG = VAEConfig(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,  # replaced by 1 / std of the latents after training
)
STEPS = 1200
BATCH = 64
LEARNING_RATE = 2e-3
MAX_SHIFT = 2  # pixels of 32
MIN_CONTRAST = 0.8


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shift each image by up to 2 pixels per axis and fade it by up to a fifth.

    images: (B, 32, 32, 3) in [-1, 1], black = -1. Returns the same shape and range.
    """
    shift_key, contrast_key = jax.random.split(key)
    batch = images.shape[0]
    corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * MAX_SHIFT + 1)
    contrast = jax.random.uniform(
        contrast_key, (batch, 1, 1, 1), minval=MIN_CONTRAST, maxval=1.0
    )
    border = (MAX_SHIFT, MAX_SHIFT)
    ink = jnp.pad((images + 1) * contrast, ((0, 0), border, border, (0, 0)))
    crop = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(
            image, (corner[0], corner[1], 0), images.shape[1:]
        )
    )
    return crop(ink, corners) - 1


def measure(folder: Path) -> dict[str, str]:
    """Figures of a saved autoencoder on the held-out digits, ready to print."""
    model, params = load_vae(str(folder))
    train_pixels, train_labels = load_digits("train")
    pixels, labels = load_digits("test")
    mean, std = train_vae.encoded(model, params, pixels)
    noise = np.random.default_rng(SEED).normal(size=mean.shape).astype(np.float32)
    classifier = SVC().fit(to_grey(train_pixels), train_labels)
    figures = {
        "SVC on the held-out digits themselves": _accuracy(classifier, pixels, labels)
    }
    for name, latents in (("mean", mean), ("sample", mean + std * noise)):
        rebuilt = train_vae.decoded(model, params, latents)
        right = _accuracy(classifier, rebuilt, labels)
        figures[f"posterior {name}: SVC on reconstructions"] = right
    return figures | train_vae.measure(folder, pixels)[0]


def _accuracy(classifier: SVC, pixels: np.ndarray, labels: np.ndarray) -> str:
    return f"{100 * classifier.score(to_grey(pixels), labels):.2f} %"


README = f"""# Autoencoder of handwritten digits

A small AutoencoderKL (diffusers' folder format, float16 weights) that turns 32x32 RGB
images of digits into 4x4 latents of 4 numbers. It lets the whole pipeline run without a
download. It knows nothing but the digits of scikit-learn and is of no use for other
images.

Trained on the 1,437 digits of `sra2_jax.data.digits.load_digits("train")` by

    python -m tools.train_digits_vae --out DIR

({STEPS} steps of {BATCH} images, {{minutes}} minutes on two CPU cores; another
machine gives slightly other numbers). The digits are UCI's "Optical Recognition of
Handwritten Digits", CC BY 4.0.

On the 360 held-out digits, with a classifier fitted to the real train digits:

| figure | value |
|---|---|
{{rows}}
"""


def save(pixels: np.ndarray, folder: Path) -> None:
    """Train and write the weights."""
    model = AutoencoderKL(CONFIG)
    numbers = STEPS, BATCH, LEARNING_RATE
    params = train_vae.train(model, pixels, *numbers, augment=augment)
    scale = 1 / train_vae.latent_std(model, params, pixels)
    config = dataclasses.replace(CONFIG, scaling_factor=round(scale, 6))
    FORMAT.save(folder, config, halved(params))


if __name__ == "__main__":
    run_program(lambda: run(__doc__ or "", save, measure, README))
