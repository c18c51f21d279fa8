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


def alignment_head(
    width: int,
    features: int,
    *,
    layers: int,
    hidden: int,
    final_layer: bool,
    dtype: Any,
) -> MLPHead:
    """The head on tokens of `width` predicting `features` numbers.

    Layers counts all linear layers, the hidden ones of size `hidden` (0: twice
    `width`). SRA 2: 5 layers to p*p*C; REPA: 3 with hidden 2048 to the encoder's width;
    SRA: 2 back to `width`. With `final_layer` the last hidden layer returns to
    `width`, D -> hidden -> ... -> D, and DiT's final layer is the last one.
    """
    sizes = [hidden or 2 * width] * (layers - 1)
    if final_layer and sizes:
        sizes[-1] = width
    return MLPHead(tuple(sizes), features, final_layer, dtype)
