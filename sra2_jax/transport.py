"""Paths between data and noise, their targets, and conversions between predictions.

Here t = 0 is data and t = 1 noise: x_t = alpha(t) x + sigma(t) eps. The reference code
of SiT runs time the other way. Source: SiT (arXiv 2401.08740) `transport/path.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax import config

# Noise schedule of the variance-preserving path, SiT's defaults.
VP_MIN, VP_MAX = 0.1, 20.0


def coefficients(
    path: str, t: Float[Array, "..."]
) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma, alpha', sigma' at t in [0, 1]; each shaped like t.

    linear: 1 - t, t. gvp (cosine): cos(pi t / 2), sin(pi t / 2). vp: alpha =
    exp(-(VP_MAX - VP_MIN) t^2 / 4 - VP_MIN t / 2), sigma = sqrt(1 - alpha^2), whose
    sigma' is infinite at t = 0.
    """
    if path == "linear":
        return 1 - t, t, -jnp.ones_like(t), jnp.ones_like(t)
    if path == "gvp":
        half = jnp.pi / 2
        cos, sin = jnp.cos(half * t), jnp.sin(half * t)
        return cos, sin, -half * sin, half * cos
    spread = VP_MAX - VP_MIN
    log_alpha = -0.25 * spread * t**2 - 0.5 * VP_MIN * t
    d_log_alpha = -0.5 * spread * t - 0.5 * VP_MIN
    alpha = jnp.exp(log_alpha)
    sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma


def _time_of_noise_ratio(path: str, ratio: Array) -> Array:
    """The t at which sigma / alpha equals `ratio`."""
    if path == "linear":
        return ratio / (1 + ratio)
    if path == "gvp":
        return jnp.arctan(ratio) * 2 / jnp.pi
    # vp: (VP_MAX - VP_MIN) t^2 / 2 + VP_MIN t = log(1 + ratio^2)
    spread = VP_MAX - VP_MIN
    root = jnp.sqrt(VP_MIN**2 + 2 * spread * jnp.log1p(ratio**2))
    return (root - VP_MIN) / spread


class Transport(config.Transport):
    """A path and what the network predicts on it."""

    @property
    def train_range(self) -> tuple[float, float]:
        """Times trained on; SiT keeps away from where the target is singular."""
        if self.path == "vp":
            return 1e-5, 1.0
        if self.prediction == "velocity":
            return 0.0, 1.0
        return 1e-3, 1 - 1e-3

    @property
    def sample_range(self) -> tuple[float, float]:
        """(last, first) time of a sampled trajectory; SiT's `sample_eps`."""
        return (1e-3, 1.0) if self.path == "vp" else self.train_range

    def shifted(self, t: Any) -> Any:
        """Times moved towards noise, SD3's way (arXiv 2403.03206, eq. 23)."""
        s = self.time_shift
        return t if s == 1 else s * t / (1 + (s - 1) * t)

    def sample_times(self, key: Array, n: int) -> Float[Array, " n"]:
        """Draw n training times, float32, inside `train_range`."""
        low, high = self.train_range
        if self.time == "uniform":
            t = jax.random.uniform(key, (n,), minval=low, maxval=high)
            if self.time_shift == 1:
                return t
        else:
            ratio = self.time_mean + self.time_std * jax.random.normal(key, (n,))
            t = _time_of_noise_ratio(self.path, jnp.exp(ratio))
        return jnp.clip(self.shifted(t), low, high)

    def _at(self, t: Array, x: Array) -> tuple[Array, Array, Array, Array]:
        return coefficients(self.path, t.reshape(t.shape + (1,) * (x.ndim - t.ndim)))

    def interpolate(self, x: Array, noise: Array, t: Array) -> tuple[Array, Array]:
        """x_t and the network's target, for data x, noise of x's shape, t (B,)."""
        alpha, sigma, d_alpha, d_sigma = self._at(t, x)
        x_t = alpha * x + sigma * noise
        if self.prediction == "velocity":
            return x_t, d_alpha * x + d_sigma * noise
        return x_t, noise if self.prediction == "noise" else x

    def velocity(self, output: Array, x_t: Array, t: Array) -> Array:
        """dx_t/dt from the network's output; singular at t = 1 for "noise"."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "data":
            return self.towards(output, x_t, t)
        alpha, sigma, d_alpha, d_sigma = self._at(t, x_t)
        return d_alpha * (x_t - sigma * output) / alpha + d_sigma * output

    def towards(self, clean: Array, x_t: Array, t: Array) -> Array:
        """dx_t/dt where E[x | x_t] is `clean`.

        The noise is (x_t - alpha clean) / sigma, without bound as t goes to 0: there t
        counts as 1e-3, where training on "data" begins.
        """
        alpha, sigma, d_alpha, d_sigma = self._at(jnp.maximum(t, 1e-3), x_t)
        return d_alpha * clean + d_sigma * (x_t - alpha * clean) / sigma

    def score(self, velocity: Array, x_t: Array, t: Array) -> Array:
        """Score grad log p_t(x_t) from the velocity; finite for t > 0.

        Written as (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')), SiT's
        formula multiplied through by alpha', so that it holds where alpha' = 0.
        """
        alpha, sigma, d_alpha, d_sigma = self._at(t, x_t)
        denominator = sigma * (d_alpha * sigma - alpha * d_sigma)
        return (alpha * velocity - d_alpha * x_t) / denominator
