"""iREPA (arXiv 2512.10794): REPA that keeps the spatial structure of the features."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax import config_align
from sra2_jax.alignment.base import Arrays, standardise
from sra2_jax.alignment.encoder import EncoderTarget
from sra2_jax.models.dit import DiT


class SpatialAlignment(config_align.AlignIREPA, EncoderTarget):
    """An encoder's features, each channel standardised over the image's tokens; the
    head is one convolution over the grid of tokens."""

    title = "iREPA"
    aim = "an encoder's features, standardised over the image"
    reference = "irepa_head"  # no name is published

    def head(self, network: DiT) -> nn.Module:
        return ConvHead(self.width, network.grid, network.dtype)

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        features = super().compute_target(network, frozen, ema, draws)
        return standardise(jnp.asarray(features, jnp.float32), 1)


class ConvHead(nn.Module):
    """One 3x3 convolution over a square of row-major tokens, padded with zeros.

    features: size of each token's output; grid: tokens on a side.
    """

    features: int
    grid: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        b, t, d = x.shape
        conv = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv")
        x = conv(x.reshape(b, self.grid, self.grid, d)).reshape(b, t, self.features)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
