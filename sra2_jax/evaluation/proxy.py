"""The quickstart's proxy metrics on handwritten digits. They are not FID."""

import numpy as np
from sklearn.svm import SVC

from sra2_jax.data.digits import load_digits, to_8x8
from sra2_jax.evaluation.metrics import frechet_distance, gaussian

SPACE = (
    "the 64 numbers of the image averaged to 8x8 grey pixels in [0, 1], against the "
    "360 held-out real digits"
)
NOTE = (
    "Proxies, not FID: a Frechet distance between Gaussians fitted in a 64-dimensional "
    "pixel space on a few hundred images, and the share of samples that a support "
    "vector machine fitted on the 1,437 real training digits gives the label asked for."
)


class DigitsProxy:
    """Scores sampled digits against held-out real ones."""

    def __init__(self) -> None:
        self.train = load_digits("train")
        self.test = load_digits("test")
        # gamma = 0.001 is the usual choice for pixels 0..16
        self._classifier = SVC(gamma=0.001 * 16**2).fit(
            to_8x8(self.train[0]), self.train[1]
        )
        self._real = gaussian(to_8x8(self.test[0]))

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """{"frechet", "accuracy"} of uint8 images (N, 32, 32, 3) for their labels."""
        features = to_8x8(images)
        return {
            "frechet": frechet_distance(*gaussian(features), *self._real),
            "accuracy": float(np.mean(self._classifier.predict(features) == labels)),
        }

    def reference(self, reconstruction: np.ndarray) -> dict[str, float]:
        """What real digits score: the training set, the held-out set (accuracy; its
        distance is 0 by definition), and `reconstruction`, the latter through the VAE.
        """
        train = self.score(self.train[0], self.train[1])
        decoded = self.score(reconstruction, self.test[1])
        return {
            "real_frechet": train["frechet"],
            "real_accuracy": self.score(*self.test)["accuracy"],
            "reconstruction_frechet": decoded["frechet"],
            "reconstruction_accuracy": decoded["accuracy"],
        }
