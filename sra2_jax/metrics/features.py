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
from sra2_jax.sharding import replicated, spread
from sra2_jax.storage import sha256
from sra2_jax.weights import load_inception

KINDS = ("inception", "digits")
Outputs = dict[str, np.ndarray]


class InceptionFeatures:
    """The Inception network of FID over all devices of a mesh, float32.

    Every process gives the same images and gets all features.

    Args:
      weights: see `load_inception`.
      batch: images at a time, at most; a multiple of the mesh's devices.

    Raises UserError: no usable weights.
    """

    kind, distance = "inception", "fid"

    def __init__(self, weights: str, mesh: Mesh, batch: int) -> None:
        network, params = load_inception(weights)
        self.facts = {
            "features": "Inception of 2015-12-05, as torch-fidelity",
            "inception": Path(weights).name,
            "inception_sha256": sha256(weights),
        }
        self._params = jax.device_put(params, replicated(mesh))
        self._mesh, self._batch = mesh, batch

        def run(params: Any, images: Array) -> dict[str, Array]:
            out: Any = network.apply({"params": params}, images)
            return {
                "pool": out.pool,
                "spatial": out.spatial.reshape(len(images), -1),
                "probabilities": jax.nn.softmax(out.logits),
            }

        self._run: Any = jax.jit(run, out_shardings=replicated(mesh))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Outputs:
        assert len(images) <= self._batch
        placed = spread(images, self._batch, self._mesh)
        found = jax.device_get(self._run(self._params, placed))
        return {name: values[: len(images)] for name, values in found.items()}


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


Features = InceptionFeatures | DigitsFeatures


def make_features(kind: str, weights: str, mesh: Mesh, batch: int) -> Features:
    """The network of a kind. Raises UserError where its weights are not to be had."""
    if kind == "digits":
        return DigitsFeatures()
    return InceptionFeatures(weights, mesh, batch)
