"""Heads that turn an early block's tokens into an alignment prediction."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax.models.dit import XAVIER, FinalLayer


class MLPHead(nn.Module):
    """The alignment head: linear layers with SiLU between them.

    SRA 2's default is five layers, D -> 2D -> 2D -> 2D -> 2D -> p*p*C (18.6M
    parameters at XL/2); REPA's and SRA's heads are other widths of the same module.

    Attributes:
      widths: sizes of the hidden layers.
      features: size of the output vector of each token.
      final_layer: end in a layer of the design of DiT's final layer (LayerNorm and
        adaLN by the condition vector) in place of a plain linear layer.
      dtype: compute type of the matrix products.
    """

    widths: tuple[int, ...]
    features: int
    final_layer: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        """Tokens (B, T, D) and condition (B, D) -> predictions (B, T, features)."""
        for i, width in enumerate(self.widths):
            if i:
                x = nn.silu(x)
            x = nn.Dense(
                width, dtype=self.dtype, kernel_init=XAVIER, name=f"linear_{i}"
            )(x)
        if self.final_layer:
            x = FinalLayer(self.features, self.dtype, name="final")(x, c)
        else:
            x = nn.Dense(
                self.features,
                dtype=self.dtype,
                kernel_init=XAVIER,
                name=f"linear_{len(self.widths)}",
            )(nn.silu(x))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def latent_head(
    width: int,
    patch_dim: int,
    *,
    layers: int,
    width_ratio: float,
    final_layer: bool,
    dtype: Any,
) -> MLPHead:
    """SRA 2's head on tokens of `width` predicting `patch_dim` = p*p*C numbers.

    Layers counts all linear layers. With `final_layer` the last hidden layer returns
    to `width`, D -> rD -> ... -> D, and DiT's final layer is the last one.
    """
    hidden = [int(width * width_ratio)] * (layers - 1)
    if final_layer and hidden:
        hidden[-1] = width
    return MLPHead(tuple(hidden), patch_dim, final_layer, dtype)
