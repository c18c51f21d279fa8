"""Targets and losses of the auxiliary alignments.

An early block's tokens, through a head that is used in training only, predict a target:
the clean VAE latent of the very sample whose noisy version the network sees (SRA 2,
arXiv 2601.17830), an encoder's patch features of the clean image (REPA, arXiv
2410.06940), or a later block of the EMA network at a lower noise level (SRA, arXiv
2505.02831). Any combination of them trains in one step.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = ("smooth_l1", "l1", "l2", "cosine")
TARGETS = ("sample", "mean")
SOURCES = ("images", "features")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


@dataclass(frozen=True)
class Alignment:
    """What every alignment term has; the defaults are SRA 2's at XL size.

    Attributes:
      depth: 1-based number of the aligned block (B: 2, L and XL: 8).
      weight: lambda of the paper; schedule, see `weight_at`.
      loss: "smooth_l1" (with beta), "l1", "l2" or "cosine".
      zscore: standardise prediction and target per sample, for VAEs whose latents
        are not of unit scale.
      t_min, t_max: samples whose time lies outside are left out (in [0, 1]).
      head_layers, head_width, head_final_layer: the head, see `models.heads`;
        hidden channels, 0 for twice the network's width.
    """

    depth: int = 8
    weight: float = 1.0
    schedule: str = "constant"
    schedule_start: int = 0
    schedule_steps: int = 1
    loss: str = "smooth_l1"
    beta: float = 0.05
    zscore: bool = False
    t_min: float = 0.0
    t_max: float = 1.0
    head_layers: int = 5
    head_width: int = 0
    head_final_layer: bool = False

    def weight_at(self, step: Array) -> Array:
        """The weight at `step`: constant, or from `schedule_start` on a fall over
        `schedule_steps` steps, to zero ("linear", "cosine"), or tenfold every so
        many ("exponential", SRA's rule counted in steps).
        """
        x = (step - self.schedule_start) / self.schedule_steps
        x = jnp.maximum(jnp.asarray(x, jnp.float32), 0.0)
        factor = {
            "constant": jnp.ones_like(x),
            "linear": jnp.maximum(1 - x, 0.0),
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(x, 1.0))),
            "exponential": 10.0**-x,
        }[self.schedule]
        return self.weight * factor

    def loss_value(
        self,
        prediction: Float[Array, "b t d"],
        target: Float[Array, "b t d"],
        t: Float[Array, " b"],
    ) -> Float[Array, ""]:
        """Mean loss over the batch, unweighted.

        Samples with t outside [t_min, t_max] count as zero and still count in the
        mean, so that the expectation is that of 1[t in range] times the loss.
        """
        if self.zscore:
            prediction, target = zscore(prediction), zscore(target)
        losses = elementwise(self.loss, prediction, target, self.beta)
        losses = losses.reshape(losses.shape[0], -1).mean(axis=1)
        return jnp.mean(losses * ((t >= self.t_min) & (t <= self.t_max)))


@dataclass(frozen=True)
class LatentAlignment(Alignment):
    """SRA 2: the scaled latent.

    target: "sample" (the one that x_t is built from) or "mean" (the posterior's).
    """

    target: str = "sample"


@dataclass(frozen=True)
class EncoderAlignment(Alignment):
    """REPA: an encoder's patch features.

    model: where its weights are; width: of its tokens; source: "images" (the encoder
    runs in the step on the records' images) or "features" (stored in the records).
    """

    model: str = ""
    width: int = 768
    source: str = "images"


@dataclass(frozen=True)
class TeacherAlignment(Alignment):
    """SRA: the output of the EMA network's block `teacher_depth`.

    It sees the same sample, noise and dropped label at a time that lies up to
    `interval` before the student's, see `teacher_times`.
    """

    teacher_depth: int = 20
    interval: float = 0.2

    def teacher_times(
        self, t: Float[Array, " b"], u: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """clamp(t - interval * u, 0, 1), u uniform in [0, 1) for each sample."""
        return jnp.clip(t - self.interval * u, 0.0, 1.0)


# section of config.align -> its class
KINDS: dict[str, type[Alignment]] = {
    "vae": LatentAlignment,
    "encoder": EncoderAlignment,
    "teacher": TeacherAlignment,
}


def zscore(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Each sample to mean 0 and deviation 1 over all of its numbers."""
    x = x - x.mean(axis=(1, 2), keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True) + 1e-6)


def elementwise(loss: str, a: Array, b: Array, beta: float) -> Array:
    """Loss for each element; for "cosine" 1 - cos over the last axis, (B, T).

    The last axis holds a token's channels. (SRA's cosine defaults to the token axis.)
    smooth_l1(d; beta) = d^2 / (2 beta) if |d| < beta else |d| - beta / 2.
    """
    if loss == "cosine":
        return 1 - jnp.sum(_unit(a) * _unit(b), axis=-1)
    d = jnp.abs(a - b)
    if loss == "l1":
        return d
    if loss == "l2":
        return jnp.square(d)
    if loss == "smooth_l1":
        return jnp.where(d < beta, jnp.square(d) / (2 * beta), d - beta / 2)
    raise ValueError(f"unknown alignment loss {loss!r}: one of {LOSSES}")


def _unit(x: Array) -> Array:
    # rsqrt of a floored square, not a floored norm: finite gradient at x = 0.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-16))
