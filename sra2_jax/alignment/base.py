"""What every alignment is: a head on an early block, a target, a loss, a schedule.

A method is a file beside this one, see docs/extending.md.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax import config_align
from sra2_jax.models.block import FinalLayer, dense
from sra2_jax.models.dit import DiT

Arrays = Mapping[str, Array]


class Alignment(config_align.Alignment):
    """Targets are computed inside the jitted step, without gradient.

    Attributes:
      title: of the method, "REPA"; aim: what a block is aligned with, in words.
      reference: name of the head in the method's published checkpoints;
        reference_linear: of its i-th linear layer, {twice} = 2 i or {next} = i + 1.
    """

    reference: ClassVar[str]
    reference_linear: ClassVar[str] = "{twice}"  # in a sequence with SiLU between

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def aim(self) -> str:
        raise NotImplementedError

    @property
    def fields(self) -> tuple[str, ...]:
        """What it reads of a record besides latent and label: "image", "features"."""
        return ()

    @property
    def frozen(self) -> Any:
        """The network that the target runs, whose `shapes()` are its parameters'
        ShapeDtypeStructs; None where it runs none."""
        return None

    def load(self) -> Any:
        """Parameters of `frozen`. Raises UserError where they cannot be had."""
        return None

    def features(self, network: DiT) -> int:
        """Numbers that the head predicts for each token."""
        raise NotImplementedError

    def head(self, network: DiT) -> nn.Module:
        """(tokens (B, T, D), condition (B, D)) -> predictions (B, T, features)."""
        raise NotImplementedError

    def draw(self, key: Array, clean: Arrays, transport: Any) -> dict[str, Array]:
        """What the target needs besides the record's fields. key: shared by all
        alignments; clean: z, the sampled latent, mean, noise and t of the step."""
        return {}

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        """Target tokens (B, T, features). frozen: parameters as of `load`; ema: of the
        network's average; draws: x_t, t, y, the record's fields and those of `draw`."""
        raise NotImplementedError

    def macs(self, network: DiT) -> int:
        """Multiply-accumulates of the target for one image."""
        return 0

    def weight_at(self, step: Array) -> Array:
        """Constant, or from `schedule_start` on a fall over `schedule_steps` steps, to
        zero, or tenfold every so many ("exponential", SRA's rule)."""
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
        """Mean loss over the batch, unweighted. Samples with t outside [t_min, t_max]
        count as zero: the expectation is that of 1[t in range] times the loss."""
        if self.zscore:
            prediction, target = (standardise(x, 1, 2) for x in (prediction, target))
        losses = elementwise(self.loss, prediction, target, self.beta)
        losses = losses.reshape(losses.shape[0], -1).mean(axis=1)
        return jnp.mean(losses * ((t >= self.t_min) & (t <= self.t_max)))


class MLPAlignment(config_align.MLPAlignment, Alignment):
    """One whose head are linear layers."""

    def head(self, network: DiT) -> nn.Module:
        """With `head_final_layer` the last hidden layer returns to the width D."""
        sizes = [self.head_width or 2 * network.model.width] * (self.head_layers - 1)
        if self.head_final_layer and sizes:
            sizes[-1] = network.model.width
        features = self.features(network)
        final = network.model.norm if self.head_final_layer else None
        return MLPHead(tuple(sizes), features, final, network.dtype)


class MLPHead(nn.Module):
    """Linear layers with SiLU between them.

    Attributes:
      widths: of the hidden layers; features: of the output of each token.
      final_layer: the norm of a last layer like DiT's final one.
    """

    widths: tuple[int, ...]
    features: int
    final_layer: Literal["layer", "rms"] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        sizes = (*self.widths, *(() if self.final_layer else (self.features,)))
        for i, width in enumerate(sizes):
            x = dense(self, width, f"linear_{i}")(nn.silu(x) if i else x)
        if self.final_layer:
            norm = self.final_layer
            x = FinalLayer(self.features, self.dtype, norm, name="final")(x, c)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def head_macs(shapes: Any, tokens: int) -> int:
    """Multiply-accumulates of a head for one image, from its parameters' shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    kernels = {jax.tree_util.keystr(p): x for p, x in leaves if x.ndim > 1}
    # The condition's layer runs once an image, the others for each token.
    times = {path: 1 if "modulation" in path else tokens for path in kernels}
    return sum(times[path] * x.size for path, x in kernels.items())


def standardise(x: Float[Array, "b t d"], *axes: int) -> Float[Array, "b t d"]:
    """To mean 0 and deviation 1 over these axes."""
    x = x - x.mean(axis=axes, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(axis=axes, keepdims=True) + 1e-6)


def elementwise(loss: str, a: Array, b: Array, beta: float) -> Array:
    """Loss for each element; for "cosine" 1 - cos over each token's channels, (B, T),
    for "cosine_tokens" over the tokens, (B, D), as SRA's code has it.

    smooth_l1(d; beta) = d^2 / (2 beta) if |d| < beta else |d| - beta / 2.
    """
    if loss == "cosine":
        return 1 - jnp.sum(_unit(a) * _unit(b), axis=-1)
    if loss == "cosine_tokens":
        return elementwise("cosine", a.swapaxes(1, 2), b.swapaxes(1, 2), beta)
    d = jnp.abs(a - b)
    if loss == "l1":
        return d
    if loss == "l2":
        return jnp.square(d)
    return jnp.where(d < beta, jnp.square(d) / (2 * beta), d - beta / 2)


def _unit(x: Array) -> Array:
    # rsqrt of a floored square, not a floored norm: finite gradient at x = 0.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-16))
