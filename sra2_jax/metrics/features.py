"""Networks whose features sets of images are compared by.

A network has a `kind`; `distance`, the name of the Fréchet distance between its "pool"
features; and `facts`, what result files say of it. Called with images, uint8
(n, H, W, 3), it gives "pool" (n, D) and, where it has them, "spatial" (n, E),
"probabilities" (n, K), "predicted" labels (n,).
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from sra2_jax.data.digits import load_digits, to_8x8
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import preprocess
from sra2_jax.sharding import replicated, spread
from sra2_jax.storage import sha256
from sra2_jax.weights import load_dinov2, load_inception

KINDS = ("inception", "dinov2", "digits")
Outputs = dict[str, np.ndarray]


class _Network:
    """A network over all devices of a mesh. Every process gives the same images and
    gets all features.

    run: (params, images) -> outputs; batch: images at a time, at most; a multiple of
    the mesh's devices.
    """

    def __init__(self, run: Any, params: Any, mesh: Mesh, batch: int) -> None:
        self._params = jax.device_put(params, replicated(mesh))
        self._mesh, self._batch = mesh, batch
        self._run: Any = jax.jit(run, out_shardings=replicated(mesh))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Outputs:
        assert len(images) <= self._batch
        placed = spread(images, self._batch, self._mesh)
        found = jax.device_get(self._run(self._params, placed))
        return {name: values[: len(images)] for name, values in found.items()}


class InceptionFeatures(_Network):
    """The Inception network of FID, float32.

    weights: see `load_inception`. Raises UserError: no usable ones.
    """

    kind, distance = "inception", "fid"

    def __init__(self, weights: str, mesh: Mesh, batch: int) -> None:
        network, params = load_inception(weights)
        self.facts = {
            "features": "Inception of 2015-12-05, as torch-fidelity",
            "inception": Path(weights).name,
            "inception_sha256": sha256(weights),
        }

        def run(params: Any, images: Array) -> dict[str, Array]:
            out: Any = network.apply({"params": params}, images)
            return {
                "pool": out.pool,
                "spatial": out.spatial.reshape(len(images), -1),
                "probabilities": jax.nn.softmax(out.logits),
            }

        super().__init__(run, params, mesh, batch)


class DINOv2Features(_Network):
    """DINOv2's class token after the last norm, float32, of images resized to 16
    patches a side, 224 pixels.

    The distance is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675; their dgm-eval takes
    ViT-L/14 and Pillow's bicubic resize, this takes JAX's).

    weights: see `load_dinov2`. Raises UserError: no usable ones.
    """

    kind, distance = "dinov2", "fd_dinov2"

    def __init__(self, weights: str, mesh: Mesh, batch: int) -> None:
        encoder, params = load_dinov2(weights)
        self.facts = {"features": "DINOv2's class token", "dinov2": weights}

        def run(params: Any, images: Array) -> dict[str, Array]:
            pixels = preprocess(images, 16 * encoder.config.patch_size)
            return {"pool": apply(encoder, params, pixels)[:, 0]}

        super().__init__(run, params, mesh, batch)


class DigitsFeatures:
    """The quickstart's proxy: the 64 pixels of a digit, and which digit it is.

    A support vector machine fitted on the 1,437 training digits recognises it.
    """

    kind, distance = "digits", "frechet"

    def __init__(self) -> None:
        self.facts = {
            "features": "the 64 numbers of the image averaged to 8x8 grey pixels in "
            "[0, 1]; a proxy, not FID"
        }
        from sklearn.svm import SVC  # takes two seconds

        images, labels = load_digits("train")
        # gamma = 0.001 is the usual choice for pixels 0..16
        self._classifier = SVC(gamma=0.001 * 16**2).fit(to_8x8(images), labels)

    def __call__(self, images: UInt8[np.ndarray, "n 32 32 3"]) -> Outputs:
        pool = to_8x8(images)
        return {"pool": pool, "predicted": self._classifier.predict(pool)}


Features = InceptionFeatures | DINOv2Features | DigitsFeatures


def make_features(kind: str, weights: str, mesh: Mesh, batch: int) -> Features:
    """The network of a kind. Raises UserError where its weights are not to be had."""
    if kind == "digits":
        return DigitsFeatures()
    if kind == "dinov2":
        return DINOv2Features(weights, mesh, batch)
    return InceptionFeatures(weights, mesh, batch)
