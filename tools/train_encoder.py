"""Train a small encoder, DINOv2's stand-in, on images of one's own without labels.

    python -m tools.train_encoder IMAGES --held_out=IMAGES --out=DIR --resolution=64

IMAGES is what `sra2 encode` reads. Two views of each image are to find each other among
all views of a batch (SimCLR). DIR becomes a folder that transformers and this package
read, with README.md: how well its features tell the held-out images' classes. Killed,
the same command goes on.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sra2_jax.command import Parser, run_program
from sra2_jax.data.images import SPECS
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config, patch_features, standardise
from sra2_jax.weights import load_dinov2
from sra2_jax.weights.dinov2 import FORMAT
from sra2_jax.weights.tree import Params
from tools.minimise import SEED, halved, minimise
from tools.train_vae import STATE, in_parts, read_images

TEMPERATURE = 0.1
WEIGHT_DECAY = 0.05
# How far a view may be from its image.
MIN_SIDE = 0.6  # of a crop, of the image's
MAX_SCALE = 0.4  # brightness, contrast and saturation, each by itself
MAX_NOISE = 0.1  # standard deviation, pixels in [0, 1]
View = Callable[[jax.Array, jax.Array], jax.Array]


def view(key: jax.Array, image: jax.Array) -> jax.Array:
    """An image (H, W, 3) in [0, 1] cropped, perhaps mirrored, its colours changed and
    made noisy. Returns the same shape, not clipped."""
    keys = jax.random.split(key, 6)
    size = len(image)
    zoom = 1 / jax.random.uniform(keys[0], (2,), minval=MIN_SIDE)
    corner = -jax.random.uniform(keys[1], (2,)) * (zoom - 1) * size
    image = jax.image.scale_and_translate(
        image, image.shape, (0, 1), zoom, corner, "linear"
    )
    image = jnp.where(jax.random.bernoulli(keys[2]), image[:, ::-1], image)
    brightness, contrast, saturation = 1 + jax.random.uniform(
        keys[3], (3,), minval=-MAX_SCALE, maxval=MAX_SCALE
    )
    image = image * brightness
    image = image.mean() + contrast * (image - image.mean())
    grey = image.mean(-1, keepdims=True)
    image = grey + saturation * (image - grey)
    deviation = jax.random.uniform(keys[4], maxval=MAX_NOISE)
    return image + deviation * jax.random.normal(keys[5], image.shape)


def contrast(first: jax.Array, second: jax.Array) -> jax.Array:
    """Find each view's partner among all views (SimCLR: Chen et al. 2020, eq. 1).

    first, second: (B, d), two views of the same B images. Returns the mean loss.
    """
    both = jnp.concatenate([first, second])
    both = both / jnp.linalg.norm(both, axis=-1, keepdims=True)
    alike = both @ both.T / TEMPERATURE
    alike = jnp.where(jnp.eye(len(both), dtype=bool), -jnp.inf, alike)
    partner = jnp.roll(jnp.arange(len(both)), len(first))
    return optax.softmax_cross_entropy_with_integer_labels(alike, partner).mean()


def train(
    model: DINOv2,
    pixels: np.ndarray,
    steps: int,
    batch_size: int,
    learning_rate: float,
    view: View = view,
    class_token: bool = True,
    seed: int = SEED,
    kept: Path | None = None,
) -> Params:
    """The encoder's parameters after steps of AdamW.

    pixels: uint8 (N, H, W, 3); view: (key, image (H, W, 3) in [0, 1]) -> the same;
    class_token: whether it learns too, and not the patches alone, which an alignment
    takes; kept: see `minimise`.
    """
    images = jnp.asarray(pixels)
    batch_size = min(batch_size, len(images))
    projector = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(64)])

    def batch_loss(params: Params, key: jax.Array) -> jax.Array:
        draw, distort = jax.random.split(key)
        chosen = jax.random.permutation(draw, len(images))[:batch_size]
        batch = images[chosen].astype(jnp.float32) / 255
        keys = jax.random.split(distort, 2 * batch_size)
        views = jax.vmap(view)(keys, jnp.concatenate([batch, batch]))
        tokens = apply(model, params["encoder"], standardise(views))
        pooled = {"patches": tokens[:, 1:].mean(1), "class": tokens[:, 0]}
        found = [
            apply(projector, head, pooled[name])
            for name, head in params["projectors"].items()
        ]
        return sum((contrast(*jnp.split(x, 2)) for x in found), jnp.zeros(()))

    keys = jax.random.split(jax.random.key(seed), 3)
    image, token = jnp.zeros((1, *images.shape[1:])), model.config.hidden_size
    names = ("patches", "class") if class_token else ("patches",)
    params = {
        "encoder": model.init(keys[0], image)["params"],
        "projectors": {
            name: projector.init(key, jnp.zeros((1, token)))["params"]
            for name, key in zip(names, keys[1:], strict=False)
        },
    }
    adamw = functools.partial(optax.adamw, weight_decay=WEIGHT_DECAY)
    numbers = learning_rate, steps, kept
    trained: Params = minimise(batch_loss, params, adamw, *numbers)["encoder"]
    return trained


def pooled_features(model: DINOv2, params: Params, pixels: np.ndarray) -> np.ndarray:
    """Mean of the patch features of uint8 images, scaled to length 1: (N, D)."""

    @jax.jit
    def pool(params: Params, pixels: jax.Array) -> jax.Array:
        return patch_features(model, params, pixels, model.config.grid).mean(1)

    pooled = in_parts(functools.partial(pool, params), pixels)
    length: np.ndarray = np.linalg.norm(pooled, axis=1, keepdims=True)
    return pooled / length


def judged(
    describe: Callable[[np.ndarray], np.ndarray],
    known: tuple[np.ndarray, np.ndarray],
    new: tuple[np.ndarray, np.ndarray],
) -> dict[str, str]:
    """How often classifiers that know images and labels are right about new ones."""
    x, y = describe(known[0]), describe(new[0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    kinds = {
        "1 nearest neighbour": KNeighborsClassifier(1),
        "5 nearest neighbours": KNeighborsClassifier(5),
        "linear probe": probe,
    }
    return {
        kind: f"{100 * classifier.fit(x, known[1]).score(y, new[1]):.2f} %"
        for kind, classifier in kinds.items()
    }


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("images", metavar="IMAGES", help=SPECS)
    add("--held_out", required=True, metavar="IMAGES", help="to measure on")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--resolution", type=int, default=64, help="pixels (%(default)s)")
    add("--patch", type=int, default=8, help="pixels of a token (%(default)s)")
    add("--width", type=int, default=128, help="(%(default)s)")
    add("--depth", type=int, default=4, help="(%(default)s)")
    add("--steps", type=int, default=3000, help="(%(default)s)")
    add("--batch_size", type=int, default=128, help="images (%(default)s)")
    add("--learning_rate", type=float, default=1e-3, help="(%(default)s)")
    add("--seed", type=int, default=SEED, help="of the parameters (%(default)s)")
    a = parser.parse_args()
    if (a.out / "config.json").exists():
        raise UserError(f"{a.out}: is trained already: remove it or use another --out")
    known = read_images(a.images, "train", a.resolution)
    new = read_images(a.held_out, "test", a.resolution)
    config = DINOv2Config(
        hidden_size=a.width,
        num_hidden_layers=a.depth,
        num_attention_heads=max(a.width // 32, 1),
        image_size=a.resolution,
        patch_size=a.patch,
        use_mask_token=False,
    )
    a.out.mkdir(parents=True, exist_ok=True)
    model, kept = DINOv2(config), a.out / STATE
    numbers = a.steps, a.batch_size, a.learning_rate
    params = train(model, known[0], *numbers, seed=a.seed, kept=kept)
    FORMAT.save(a.out, config, halved(params))
    kept.unlink()
    model, params = load_dinov2(str(a.out))
    image = jnp.zeros((1, a.resolution, a.resolution, 3))
    untrained = model.init(jax.random.key(SEED), image)["params"]
    rows = [
        f"| {name}: {kind} | {value} |"
        for name, weights in (("trained", params), ("untrained", untrained))
        for kind, value in judged(
            functools.partial(pooled_features, model, weights), known, new
        ).items()
    ]
    table = "\n".join(["| held-out images told by | right |", "|---|---|", *rows])
    text = f"# Encoder of {a.images}\n\nTrained without labels.\n\n{table}\n"
    (a.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_program(main)
