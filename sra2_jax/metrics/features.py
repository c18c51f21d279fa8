"""Networks whose features sets of images are compared by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from sra2_jax.config import DIGITS
from sra2_jax.data import digits
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import preprocess
from sra2_jax.sharding import replicated, spread
from sra2_jax.storage import sha256
from sra2_jax.weights import load_dinov2, load_inception

KINDS = ("inception", "dinov2", *DIGITS)
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Features:
    """A network. Called with images, uint8 (n, H, W, 3), it gives "pool" (n, D) and,
    where it has them, "spatial" (n, E), "probabilities" (n, K), "predicted" labels
    (n,).

    distance: name of the Fréchet distance between its "pool" features; facts: what
    result files say of it.
    """

    kind: str
    distance: str
    facts: dict[str, str]
    run: Callable[[np.ndarray], Outputs]

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Outputs:
        return self.run(images)


def make_features(kind: str, weights: str, mesh: Mesh, batch: int) -> Features:
    """The network of a kind, over all devices of a mesh. Every process gives the same
    images and gets all features.

    batch: images at a time, at most; a multiple of the mesh's devices.

    Raises UserError: its weights are not to be had.
    """
    if kind in DIGITS:
        return _digits(kind)
    distance, facts, function, params = (
        _dinov2(weights) if kind == "dinov2" else _inception(weights)
    )
    params = jax.device_put(params, replicated(mesh))
    compiled: Any = jax.jit(function, out_shardings=replicated(mesh))

    def run(images: np.ndarray) -> Outputs:
        assert len(images) <= batch
        found = jax.device_get(compiled(params, spread(images, batch, mesh)))
        return {name: values[: len(images)] for name, values in found.items()}

    return Features(kind, distance, facts, run)


# distance, facts, (params, images) -> outputs, params
Network = tuple[str, dict[str, str], Callable[[Any, Array], dict[str, Array]], Any]


def _inception(weights: str) -> Network:
    """The Inception network of FID, float32; weights: see `load_inception`."""
    network, params = load_inception(weights)
    facts = {
        "features": "Inception of 2015-12-05, as torch-fidelity",
        "inception": Path(weights).name,
        "inception_sha256": sha256(weights),
    }

    def function(params: Any, images: Array) -> dict[str, Array]:
        out = apply(network, params, images)
        return {
            "pool": out.pool,
            "spatial": out.spatial.reshape(len(images), -1),
            "probabilities": jax.nn.softmax(out.logits),
        }

    return "fid", facts, function, params


def _dinov2(weights: str) -> Network:
    """DINOv2's class token after the last norm, float32, of images resized to 16
    patches a side, 224 pixels, or a small network's own size; weights: see
    `load_dinov2`.

    The distance is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675; their dgm-eval takes
    ViT-L/14 and Pillow's bicubic resize, this takes JAX's).
    """
    encoder, params = load_dinov2(weights)

    def function(params: Any, images: Array) -> dict[str, Array]:
        side = min(16 * encoder.config.patch_size, encoder.config.image_size)
        pixels = preprocess(images, side)
        return {"pool": apply(encoder, params, pixels)[:, 0]}

    facts = {"features": "DINOv2's class token", "dinov2": weights}
    return "fd_dinov2", facts, function, params


# Of the support vector machine: the usual 0.001 for pixels 0..16; the best of six.
GAMMA = {"digits": 0.001 * 16**2, "mnist": 0.1}


def _digits(name: str) -> Features:
    """The quickstart's proxy: the pixels of a digit, made smaller, and which digit it
    is, as a support vector machine fitted on the training digits recognises it."""
    from sklearn.svm import SVC  # takes two seconds

    images, labels = digits.load_digits("train", name)
    classifier = SVC(gamma=GAMMA[name]).fit(digits.to_grey(images, name), labels)

    def run(images: np.ndarray) -> Outputs:
        pool = digits.to_grey(images, name)
        return {"pool": pool, "predicted": classifier.predict(pool)}

    side = digits.SIDE // digits.SCALE[name]
    what = (
        f"the {side**2} numbers of the image averaged to {side}x{side} grey pixels in "
        "[0, 1]; a proxy, not FID"
    )
    return Features(name, "frechet", {"features": what}, run)
