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
import optax
from sklearn.svm import SVC

from sra2_jax.command import run_program
from sra2_jax.data.digits import load_digits, to_8x8
from sra2_jax.models import apply
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.weights import load_vae
from sra2_jax.weights.tree import Params
from sra2_jax.weights.vae import FORMAT
from tools.digits import SEED, halved, minimise, run

CONFIG = VAEConfig(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,  # replaced by 1 / std of the latents after training
)
STEPS = 1200
BATCH = 64
LEARNING_RATE = 2e-3
# On the KL mean over latent numbers, against errors mean over pixel values. Chosen so
# that the posterior keeps a visible width: neighbouring latents then decode alike,
# which is what a diffusion model with small errors needs.
KL_WEIGHT = 1e-2
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


def loss(
    model: AutoencoderKL, params: Params, images: jax.Array, key: jax.Array
) -> jax.Array:
    """L1 + L2 of the reconstruction and KL to N(0, 1), each a mean over its numbers.

    The negative bound of Kingma and Welling 2014, eq. 10, with weights of our own.
    """
    mean, std = apply(model, params, images, method="encode")
    latents = mean + std * jax.random.normal(key, mean.shape)
    error = apply(model, params, latents, method="decode") - images
    kl = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
    return (jnp.abs(error) + error**2).mean() + KL_WEIGHT * kl.mean()


def train(model: AutoencoderKL, pixels: np.ndarray, steps: int = STEPS) -> Params:
    """Parameters after STEPS of Adam; pixels: uint8 (N, 32, 32, 3)."""
    images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1

    def batch_loss(params: Params, key: jax.Array) -> jax.Array:
        draw, shift, noise = jax.random.split(key, 3)
        batch = images[jax.random.randint(draw, (BATCH,), 0, len(images))]
        return loss(model, params, augment(shift, batch), noise)

    params = model.init(jax.random.key(SEED), images[:1])["params"]
    return minimise(batch_loss, params, optax.adam, LEARNING_RATE, steps)


def latent_std(model: AutoencoderKL, params: Params, pixels: np.ndarray) -> float:
    """Standard deviation of all numbers in sampled latents of uint8 images."""
    images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    mean, std = apply(model, params, images, method="encode")
    noise = jax.random.normal(jax.random.key(SEED + 2), mean.shape)
    return float((mean + std * noise).std())


def measure(folder: Path) -> dict[str, str]:
    """Figures of a saved autoencoder on the held-out digits, ready to print."""
    model, params = load_vae(str(folder))
    train_pixels, train_labels = load_digits("train")
    pixels, labels = load_digits("test")
    images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    mean, std = apply(model, params, images, method="encode")
    noise = jax.random.normal(jax.random.key(SEED + 3), mean.shape)
    classifier = SVC().fit(to_8x8(train_pixels), train_labels)
    figures = {
        "SVC on the held-out digits themselves": _accuracy(classifier, pixels, labels)
    }
    for name, latents in (("mean", mean), ("sample", mean + std * noise)):
        decoded = apply(model, params, latents, method="decode")
        rebuilt = np.asarray(jnp.clip(127.5 * decoded + 127.5, 0, 255).round())
        error = np.square(rebuilt - pixels).mean()
        psnr = 10 * np.log10(255**2 / error)
        right = _accuracy(classifier, rebuilt.astype(np.uint8), labels)
        figures[f"posterior {name}: SVC on reconstructions"] = right
        figures[f"posterior {name}: PSNR"] = f"{psnr:.2f} dB"
    scaled = model.config.scaling_factor * mean
    figures["scaled latents: mean per channel"] = _numbers(scaled.mean((0, 1, 2)))
    figures["scaled latents: std per channel"] = _numbers(scaled.std((0, 1, 2)))
    width = model.config.scaling_factor * float(std.mean())
    figures["scaled latents: mean posterior std"] = f"{width:.3f}"
    figures["scaling_factor"] = f"{model.config.scaling_factor:.4f}"
    return figures


def _accuracy(classifier: SVC, pixels: np.ndarray, labels: np.ndarray) -> str:
    return f"{100 * classifier.score(to_8x8(pixels), labels):.2f} %"


def _numbers(values: jax.Array) -> str:
    return ", ".join(f"{value:.3f}" for value in np.asarray(values))


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
    params = train(model, pixels)
    scale = 1 / latent_std(model, params, pixels)
    config = dataclasses.replace(CONFIG, scaling_factor=round(scale, 6))
    FORMAT.save(folder, config, halved(params))


if __name__ == "__main__":
    run_program(lambda: run(__doc__ or "", save, measure, README))
