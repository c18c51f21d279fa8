"""Train the small encoder that is shipped with the project, DINOv2's stand-in.

    python -m tools.train_digits_encoder --out DIR

fits a DINOv2 network to the train part of scikit-learn's digits without their labels
(32x32x3 -> 4x4 tokens of 64 numbers) and writes DIR/config.json, DIR/model.safetensors
(float16) and DIR/README.md with the figures measured on the 360 held-out digits. Two
minutes on two CPU cores, about 1.3 GB of memory.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sra2_jax.command import run_program
from sra2_jax.data.digits import load_digits, to_8x8
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config, patch_features, standardise
from sra2_jax.weights.dinov2 import FORMAT, load_dinov2
from sra2_jax.weights.tree import Params
from tools.digits import SEED, halved, minimise, run

CONFIG = DINOv2Config(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    use_mask_token=False,
)
STEPS = 1000
BATCH = 128  # digits, each seen in two views
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
TEMPERATURE = 0.1
# How far a view may be from its digit; like the temperature, chosen by the nearest
# neighbours among the train digits, not by the held-out ones.
MAX_TURN = 0.2  # radians
MAX_STRETCH = 0.2  # log of the factor, each axis by itself
MAX_SHEAR = 0.2
MAX_SHIFT = 3.0  # pixels of 32
MIN_CONTRAST = 0.6
MAX_NOISE = 0.1  # standard deviation, pixels in [0, 1]


def view(key: jax.Array, ink: jax.Array) -> jax.Array:
    """One digit turned, stretched, sheared, shifted, faded and made noisy.

    ink: (32, 32) in [0, 1], black = 0. Returns the same shape, not clipped.
    """
    keys = jax.random.split(key, 6)

    def draw(i: int, size: float, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(keys[i], shape, minval=-size, maxval=size)

    angle, shear = draw(0, MAX_TURN), draw(1, MAX_SHEAR)
    turn = jnp.array(
        [[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]
    )
    matrix = turn @ jnp.array([[1.0, shear], [0.0, 1.0]])
    matrix = matrix * jnp.exp(draw(2, MAX_STRETCH, (2,)))[None]
    centre = (len(ink) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(len(ink)) - centre] * 2, indexing="ij"))
    places = jnp.einsum("ij,jhw->ihw", matrix, grid)
    places = places + (draw(3, MAX_SHIFT, (2,)) + centre)[:, None, None]
    moved = map_coordinates(ink, list(places), order=1)
    faded = moved * jax.random.uniform(keys[4], minval=MIN_CONTRAST)
    level, noise = jax.random.split(keys[5])
    deviation = jax.random.uniform(level, maxval=MAX_NOISE)
    return faded + deviation * jax.random.normal(noise, ink.shape)


def contrast(first: jax.Array, second: jax.Array) -> jax.Array:
    """Find each view's partner among all views (SimCLR: Chen et al. 2020, eq. 1).

    first, second: (B, d), two views of the same B digits. Returns the mean loss.
    """
    both = jnp.concatenate([first, second])
    both = both / jnp.linalg.norm(both, axis=-1, keepdims=True)
    alike = both @ both.T / TEMPERATURE
    alike = jnp.where(jnp.eye(len(both), dtype=bool), -jnp.inf, alike)
    partner = jnp.roll(jnp.arange(len(both)), len(first))
    return optax.softmax_cross_entropy_with_integer_labels(alike, partner).mean()


def train(model: DINOv2, pixels: np.ndarray, steps: int = STEPS) -> Params:
    """The encoder's parameters after STEPS of AdamW; pixels: uint8 (N, 32, 32, 3)."""
    inks = jnp.asarray(pixels[..., 0], jnp.float32) / 255
    projector = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(64)])

    def batch_loss(params: Params, key: jax.Array) -> jax.Array:
        draw, distort = jax.random.split(key)
        batch = inks[jax.random.permutation(draw, len(inks))[:BATCH]]
        keys = jax.random.split(distort, 2 * BATCH)
        views = jax.vmap(view)(keys, jnp.concatenate([batch, batch]))
        rgb = jnp.repeat(views[..., None], 3, axis=-1)
        tokens = apply(model, params["encoder"], standardise(rgb))
        # The patches alone: they are what an alignment takes.
        found = apply(projector, params["projector"], tokens[:, 1:].mean(1))
        return contrast(*jnp.split(found, 2))

    keys = jax.random.split(jax.random.key(SEED))
    image, token = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, CONFIG.hidden_size))
    params = {
        "encoder": model.init(keys[0], image)["params"],
        "projector": projector.init(keys[1], token)["params"],
    }
    adamw = functools.partial(optax.adamw, weight_decay=WEIGHT_DECAY)
    return minimise(batch_loss, params, adamw, LEARNING_RATE, steps)["encoder"]


def pooled_features(model: DINOv2, params: Params, pixels: np.ndarray) -> np.ndarray:
    """Mean of the patch features of uint8 images, scaled to length 1: (N, D)."""
    patches = patch_features(model, params, jnp.asarray(pixels), model.config.grid)
    pooled = np.asarray(patches.mean(1))
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def measure(folder: Path) -> dict[str, str]:
    """Figures of a saved encoder on the held-out digits, ready to print."""
    model, params = load_dinov2(str(folder))
    image = jnp.zeros((1, 32, 32, 3))
    untrained = model.init(jax.random.key(SEED), image)["params"]
    (train_pixels, train_labels), (pixels, labels) = map(load_digits, ("train", "test"))
    figures = {}
    for name, describe in {
        "features": lambda x: pooled_features(model, params, x),
        "features, untrained": lambda x: pooled_features(model, untrained, x),
        "pixels, 8x8": to_8x8,
    }.items():
        known, new = describe(train_pixels), describe(pixels)
        for kind, classifier in {
            "1 nearest neighbour": KNeighborsClassifier(1),
            "5 nearest neighbours": KNeighborsClassifier(5),
            "linear probe": make_pipeline(
                StandardScaler(), LogisticRegression(max_iter=5000)
            ),
        }.items():
            right = classifier.fit(known, train_labels).score(new, labels)
            figures[f"{name}: {kind}"] = f"{100 * right:.2f} %"
    return figures


README = f"""# Encoder of handwritten digits

A small network of the DINOv2 kind (transformers' folder format, float16 weights) that
turns 32x32 RGB images of digits into 4x4 tokens of 64 numbers. It stands in for DINOv2
where nothing can be downloaded. It knows nothing but the digits of scikit-learn and is
of no use for other images.

Trained without labels, by a contrast of distorted views as in SimCLR, on the 1,437
digits of `sra2_jax.data.digits.load_digits("train")` by

    python -m tools.train_digits_encoder --out DIR

({STEPS} steps of {BATCH} digits, {{minutes}} minutes on two CPU cores; another
machine gives slightly other numbers). The digits are UCI's "Optical Recognition of
Handwritten Digits", CC BY 4.0.

On the 360 held-out digits, with classifiers that know the 1,437 with their labels;
features are the mean of the 16 patch tokens, scaled to length 1:

| figure | value |
|---|---|
{{rows}}
"""


def save(pixels: np.ndarray, folder: Path) -> None:
    """Train and write the weights."""
    FORMAT.save(folder, CONFIG, halved(train(DINOv2(CONFIG), pixels)))


if __name__ == "__main__":
    run_program(lambda: run(__doc__ or "", save, measure, README))
