"""Train a small autoencoder on images of one's own; on a CPU or a GPU.

    python -m tools.train_vae IMAGES --out=DIR --resolution=64

IMAGES is what `sra2 encode` reads; mirrored copies are seen too. DIR becomes a folder
that diffusers and this package read, with README.md: PSNR on the held-out images, and
statistics of the latents; and reconstructions.png. Killed, the same command goes on.
The error is a mean of pixels (no perceptual or adversarial one): fine detail blurs.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from sra2_jax.command import Parser, run_program
from sra2_jax.data import images as sources
from sra2_jax.errors import UserError
from sra2_jax.generator import grid
from sra2_jax.models import apply
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.weights import load_vae
from sra2_jax.weights.tree import Params
from sra2_jax.weights.vae import FORMAT
from tools.minimise import SEED, halved, minimise

# On the KL mean over latent numbers, against errors mean over pixel values. Chosen so
# that the posterior keeps a visible width: neighbouring latents then decode alike,
# which is what a diffusion model with small errors needs.
KL_WEIGHT = 1e-2
STATE = "state.msgpack"
SHOWN = 64  # images on the page
AT_ONCE = 64  # images of a measurement
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def read_images(spec: str, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source, uint8 (N, side, side, 3), and their labels (N,)."""
    source = sources.open_source(spec, split)
    rows = sources.readable(source, side, 0.0, lambda index, line: 1)
    _, images, labels = zip(*rows, strict=True)
    return np.stack(images), np.array(labels)


def mirrored(key: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images (B, H, W, 3) turned left to right."""
    turn = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(turn, images[:, :, ::-1], images)


def loss(
    model: AutoencoderKL,
    params: Params,
    images: jax.Array,
    key: jax.Array,
    kl_weight: float = KL_WEIGHT,
) -> jax.Array:
    """L1 + L2 of the reconstruction and KL to N(0, 1), each a mean over its numbers.

    The negative bound of Kingma and Welling 2014, eq. 10, with weights of our own.
    """
    mean, std = apply(model, params, images, method="encode")
    latents = mean + std * jax.random.normal(key, mean.shape)
    error = apply(model, params, latents, method="decode") - images
    kl = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
    return (jnp.abs(error) + error**2).mean() + kl_weight * kl.mean()


def train(
    model: AutoencoderKL,
    pixels: np.ndarray,
    steps: int,
    batch_size: int,
    learning_rate: float,
    augment: Augment = mirrored,
    kl_weight: float = KL_WEIGHT,
    kept: Path | None = None,
) -> Params:
    """Parameters after steps of Adam; pixels: uint8 (N, H, W, 3); kept: see
    `minimise`."""
    images = jnp.asarray(pixels)

    def batch_loss(params: Params, key: jax.Array) -> jax.Array:
        draw, change, noise = jax.random.split(key, 3)
        chosen = images[jax.random.randint(draw, (batch_size,), 0, len(images))]
        batch = augment(change, chosen.astype(jnp.float32) / 127.5 - 1)
        return loss(model, params, batch, noise, kl_weight)

    first = jnp.zeros((1, *images.shape[1:]))
    params = model.init(jax.random.key(SEED), first)["params"]
    return minimise(batch_loss, params, optax.adam, learning_rate, steps, kept)


def in_parts(function: Callable[[np.ndarray], Any], rows: np.ndarray) -> Any:
    """What a function gives for AT_ONCE rows at a time, joined: arrays (N, ...)."""
    parts = np.split(rows, range(AT_ONCE, len(rows), AT_ONCE))
    return jax.tree.map(lambda *x: np.concatenate(x), *map(function, parts))


def encoded(
    model: AutoencoderKL, params: Params, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and deviation (N, h, w, c) of uint8 images."""

    @jax.jit
    def encode(params: Params, pixels: jax.Array) -> Any:
        images = pixels.astype(jnp.float32) / 127.5 - 1
        return apply(model, params, images, method="encode")

    mean, std = in_parts(functools.partial(encode, params), pixels)
    return mean, std


def decoded(model: AutoencoderKL, params: Params, latents: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, 3) of unscaled latents."""

    @jax.jit
    def decode(params: Params, latents: jax.Array) -> jax.Array:
        images = apply(model, params, latents, method="decode")
        return jnp.clip(127.5 * images + 127.5, 0, 255).round().astype(jnp.uint8)

    images: np.ndarray = in_parts(functools.partial(decode, params), latents)
    return images


def latent_std(model: AutoencoderKL, params: Params, pixels: np.ndarray) -> float:
    """Standard deviation of all numbers in the latents of uint8 images."""
    mean, std = encoded(model, params, pixels)
    return float(np.sqrt(mean.var() + np.square(std).mean()))


def psnr(images: np.ndarray, rebuilt: np.ndarray) -> float:
    """dB, of all uint8 images together."""
    error = np.square(rebuilt.astype(np.float64) - images).mean()
    return float(10 * np.log10(255**2 / error))


def measure(folder: Path, pixels: np.ndarray) -> tuple[dict[str, str], np.ndarray]:
    """Figures of a saved autoencoder on uint8 images, ready to print, and the images
    that it makes of the posterior's mean."""
    model, params = load_vae(str(folder))
    mean, std = encoded(model, params, pixels)
    noise = np.random.default_rng(SEED).normal(size=mean.shape).astype(np.float32)
    rebuilt = decoded(model, params, mean)
    scale = model.config.scaling_factor

    def numbers(values: np.ndarray) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    drawn = decoded(model, params, mean + std * noise)
    figures = {
        "images": f"{len(pixels):,}",
        "PSNR, posterior mean": f"{psnr(pixels, rebuilt):.2f} dB",
        "PSNR, posterior sample": f"{psnr(pixels, drawn):.2f} dB",
        "scaling_factor": f"{scale:.4f}",
        "scaled latents: mean per channel": numbers(scale * mean.mean((0, 1, 2))),
        "scaled latents: std per channel": numbers(scale * mean.std((0, 1, 2))),
        "scaled latents: mean posterior std": f"{scale * std.mean():.3f}",
    }
    return figures, rebuilt


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("images", metavar="IMAGES", help=sources.SPECS)
    add("--held_out", metavar="IMAGES", help="to measure on (else the first 1,000)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--resolution", type=int, default=64, help="pixels (%(default)s)")
    levels = "channels of each level, the last at 1/2^(levels - 1) (%(default)s)"
    add("--widths", default="32,64,128,128", help=levels)
    add("--channels", type=int, default=4, help="of a latent (%(default)s)")
    add("--steps", type=int, default=10_000, help="(%(default)s)")
    add("--batch_size", type=int, default=32, help="(%(default)s)")
    add("--learning_rate", type=float, default=1e-3, help="(%(default)s)")
    add("--kl_weight", type=float, default=KL_WEIGHT, help="(%(default)s)")
    a = parser.parse_args()
    config = VAEConfig(
        latent_channels=a.channels,
        block_out_channels=tuple(map(int, a.widths.split(","))),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,  # replaced by 1 / std of the latents after training
    )
    if (a.out / "config.json").exists():
        raise UserError(f"{a.out}: is trained already: remove it or use another --out")
    pixels, _ = read_images(a.images, "train", a.resolution)
    held = read_images(a.held_out, "test", a.resolution)[0] if a.held_out else pixels
    a.out.mkdir(parents=True, exist_ok=True)
    model, kept = AutoencoderKL(config), a.out / STATE
    numbers = a.steps, a.batch_size, a.learning_rate
    params = train(model, pixels, *numbers, kl_weight=a.kl_weight, kept=kept)
    std = latent_std(model, params, pixels[:10_000])
    config = dataclasses.replace(config, scaling_factor=round(1 / std, 6))
    FORMAT.save(a.out, config, halved(params))
    kept.unlink()
    held = held[np.linspace(0, len(held) - 1, min(len(held), 1000)).astype(int)]
    figures, rebuilt = measure(a.out, held)
    shown = np.linspace(0, len(held) - 1, min(len(held), SHOWN)).astype(int)
    pairs = np.stack([held[shown], rebuilt[shown]], 1).reshape(-1, *held.shape[1:])
    Image.fromarray(grid(pairs, 16)).save(a.out / "reconstructions.png")
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = f"# Autoencoder of {a.images}\n\n| figure | value |\n|---|---|\n{rows}\n"
    (a.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_program(main)
