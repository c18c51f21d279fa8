"""Train the small encoder that is shipped with the project, DINOv2's stand-in.

    python -m tools.train_digits_encoder --out DIR

fits a DINOv2 network to the train part of scikit-learn's digits without their labels
(32x32x3 -> 4x4 tokens of 64 numbers) and writes DIR/config.json, DIR/model.safetensors
(float16) and DIR/README.md with the figures measured on the 360 held-out digits. Two
minutes on two CPU cores, about 1.3 GB of memory.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from sra2_jax.command import run_program
from sra2_jax.data.digits import load_digits, to_grey
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.weights.dinov2 import FORMAT, load_dinov2
from tools.digits import run
from tools.minimise import SEED, halved
from tools.train_encoder import judged, pooled_features, train

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
# How far a view may be from its digit; chosen by the nearest
# neighbours among the train digits, not by the held-out ones.
MAX_TURN = 0.2  # radians
MAX_STRETCH = 0.2  # log of the factor, each axis by itself
MAX_SHEAR = 0.2
MAX_SHIFT = 3.0  # pixels of 32
MIN_CONTRAST = 0.6
MAX_NOISE = 0.1  # standard deviation, pixels in [0, 1]


def distorted(key: jax.Array, ink: jax.Array) -> jax.Array:
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


def view(key: jax.Array, image: jax.Array) -> jax.Array:
    """The same of an image (32, 32, 3), which is grey."""
    return jnp.repeat(distorted(key, image[..., 0])[..., None], 3, axis=-1)


def measure(folder: Path) -> dict[str, str]:
    """Figures of a saved encoder on the held-out digits, ready to print."""
    model, params = load_dinov2(str(folder))
    image = jnp.zeros((1, 32, 32, 3))
    untrained = model.init(jax.random.key(SEED), image)["params"]
    (train_pixels, train_labels), (pixels, labels) = map(load_digits, ("train", "test"))
    figures: dict[str, str] = {}
    for name, describe in {
        "features": lambda x: pooled_features(model, params, x),
        "features, untrained": lambda x: pooled_features(model, untrained, x),
        "pixels, 8x8": to_grey,
    }.items():
        right = judged(describe, (train_pixels, train_labels), (pixels, labels))
        figures |= {f"{name}: {kind}": value for kind, value in right.items()}
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
    numbers = STEPS, BATCH, LEARNING_RATE
    params = train(DINOv2(CONFIG), pixels, *numbers, view=view, class_token=False)
    FORMAT.save(folder, CONFIG, halved(params))


if __name__ == "__main__":
    run_program(lambda: run(__doc__ or "", save, measure, README))
