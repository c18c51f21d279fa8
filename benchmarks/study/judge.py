"""What samples are held against: held-out images, in features of networks."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sra2_jax.metrics.compare import summarise
from sra2_jax.metrics.features import make_features
from sra2_jax.metrics.moments import frechet_distance, gaussian, kernel_distance
from sra2_jax.metrics.sets import ImageSet
from sra2_jax.sharding import make_mesh
from tools.train_vae import read_images

BATCH = 64
Features = dict[str, np.ndarray]  # of each network, (N, D)


class Judge:
    """Scores batches of samples.

    data: folder with the images `train` and `test`, and `judge`, a DINOv2 of
    `tools.train_encoder` that no method aligns with. more: weights of other networks,
    by kind ("inception", "dinov2").
    """

    def __init__(self, data: Path, side: int, more: dict[str, str]) -> None:
        mesh, batch = make_mesh(), BATCH * jax.device_count()
        self._side, self._batch = side, batch
        self.networks = {
            "own": make_features("dinov2", str(data / "judge"), mesh, batch),
            **{kind: make_features(kind, w, mesh, batch) for kind, w in more.items()},
        }
        pixels, labels = read_images(str(data / "test"), "test", side)
        self.held_out = self.features([pixels], len(pixels))
        seen, classes = read_images(str(data / "train"), "train", side)
        known = self.features([seen], len(seen))
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        self._classifier = probe.fit(known["own"], classes)
        # What no sample can be expected to beat.
        told = float(self._classifier.score(self.held_out["own"], labels))
        scores = self.scores(known)
        self.levels = {f"{k}, training images": v for k, v in scores.items()}
        self.levels["recognised, held-out images"] = told

    def features(self, batches: Iterable[np.ndarray], count: int) -> Features:
        """Of batches of uint8 images (n, H, W, 3), count in all."""
        images = np.concatenate([*batches])
        cuts = range(self._batch, count, self._batch)
        parts, shape = np.split(images, cuts), (count, self._side, self._side, 3)
        found = {}
        for name, network in self.networks.items():
            some = ImageSet("images", shape, lambda _: iter(parts))
            kept = summarise(network, some, self._batch, count, bar=False).kept
            assert kept is not None
            found[name] = kept
        return found

    def scores(
        self, features: Features, labels: np.ndarray | None = None
    ) -> dict[str, float]:
        """Distances to the held-out images, and the share recognised as labelled."""
        found = {}
        for name, x in features.items():
            real = self.held_out[name]
            found[f"fd {name}"] = frechet_distance(*gaussian(real), *gaussian(x))
            found[f"kd {name}"] = kernel_distance(real, x)
        if labels is not None:
            found["recognised"] = float(self._classifier.score(features["own"], labels))
        return found

    def __call__(
        self, batches: Iterable[np.ndarray], labels: np.ndarray
    ) -> tuple[dict[str, float], Features]:
        """Scores of samples with these labels, and their features."""
        features = self.features(batches, len(labels))
        return self.scores(features, labels), features
