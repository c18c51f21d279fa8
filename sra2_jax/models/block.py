"""The transformer block of DiT with adaLN-Zero, and what later work changes in it.

Source: the reference `SiT` network (willisma/SiT), and LightningDiT (arXiv 2501.01423)
for QK-norm, RMSNorm, SwiGLU, RoPE and adaLN without shift. Norms, softmax and the
residual stream are float32; matrix products run in `dtype`; parameters are float32.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sra2_jax.config import Model
from sra2_jax.sharding import BATCH, constrain

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros_init()


def rotations(width: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (grid * grid, width) of 2-D RoPE, float32, row-major tokens.

    Half of a head's channels, `width`, turn with the row, half with the column, in
    pairs of neighbours, base 10000. Source: EVA's, as LightningDiT has it.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    angles = np.arange(grid)[:, None] * frequencies.repeat(2)
    rows = np.broadcast_to(angles[:, None], (grid, grid, width // 2))
    both = np.concatenate([rows, rows.swapaxes(0, 1)], -1).reshape(grid**2, width)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def rotate(x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    """Turn each head's channels by its token's place, see `rotations`."""
    cos, sin = rotations(x.shape[-1], round(x.shape[1] ** 0.5))
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos[:, None] + turned * sin[:, None]


def normalised(x: Array, kind: str, name: str) -> Array:
    """Inside a module: RMSNorm with a weight, or LayerNorm without any, eps 1e-6, in
    float32 or wider."""
    if kind == "rms":
        return nn.RMSNorm(name=name)(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(x: Array, shift: Array | None, scale: Array) -> Array:
    """Apply adaLN's shift and scale, (B, D), to normalised tokens, (B, T, D)."""
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


def dense(
    module: Any, size: int, name: str, init: Any = XAVIER, bias: bool = True
) -> nn.Dense:
    """A linear layer in the compute type of the module that it belongs to."""
    return nn.Dense(size, bias, dtype=module.dtype, kernel_init=init, name=name)


def hidden_width(model: Model) -> int:
    """Hidden channels of a block's perceptron; of SwiGLU 2/3, as LightningDiT."""
    hidden = int(model.width * model.mlp_ratio + 1e-6)  # the ratio may be rounded
    return int(2 / 3 * hidden) if model.mlp == "swiglu" else hidden


def block_macs(tokens: int, width: int, hidden: int, matrices: int = 2) -> int:
    """Multiply-accumulates of a transformer block for one image; matrices: of width x
    hidden in its perceptron."""
    return tokens * width * (4 * width + matrices * hidden + 2 * tokens)


class SplitDense(nn.Module):
    """Several linear layers of one input in one matrix, (B, T, *shape) each: queries,
    keys and values of all heads (H, D / H), or the halves of SwiGLU.

    One matrix: xavier on separate ones would start too large. It is viewed as
    (D, parts, *shape), so that a mesh can split it by heads or channels.
    """

    parts: int
    shape: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Array, ...]:
        b, t, d = x.shape
        size, rest = math.prod(self.shape), (None,) * (len(self.shape) - 1)
        kernel = self.param("kernel", XAVIER, (d, self.parts * size))
        bias = self.param("bias", ZEROS, (self.parts * size,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel.reshape(d, self.parts, *self.shape)
        kernel = constrain(kernel, None, None, "tensor", *rest)

        # Products apart: one would be cut and put together again by copies. Of
        # matrices, with the bias a vector: cuBLAS adds it in the same kernel.
        def product(i: int) -> Array:
            out = x @ kernel[:, i].reshape(d, size) + bias[i * size : (i + 1) * size]
            out = out.reshape(b, t, *self.shape)
            return constrain(out, BATCH, None, "tensor", *rest)

        return tuple(map(product, range(self.parts)))


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT), attributes as of `DiT`."""

    model: Model
    attention: Literal["xla", "cudnn"]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        m, (b, t, d) = self.model, x.shape
        # In x's type: 1 + scale would lose half of scale's digits in bf16.
        n = 6 if m.shift else 4
        modulation = dense(self, n * d, "modulation", ZEROS)(nn.silu(c))
        modulation = constrain(modulation.astype(x.dtype), BATCH, None)
        parts: list[Any] = jnp.split(modulation, n, axis=-1)
        if not m.shift:
            parts = [None, *parts[:2], None, *parts[2:]]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        qkv = SplitDense(3, (m.heads, d // m.heads), self.dtype, name="qkv")
        q, k, v = qkv(modulate(normalised(x, m.norm, "norm1"), shift1, scale1))
        q, k = self._placed(q, "q_norm"), self._placed(k, "k_norm")
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        mixed = checkpoint_name(mixed, "attention")
        mixed = dense(self, d, "attention_out")(mixed.reshape(b, t, d))
        x = constrain(x + gate1[:, None] * mixed, BATCH, None, None)

        y = modulate(normalised(x, m.norm, "norm2"), shift2, scale2)
        width = hidden_width(m)
        # Saved for the backward pass are inputs alone, the rest is computed again.
        if m.mlp == "swiglu":
            gate, hidden = SplitDense(2, (width,), self.dtype, name="gated_in")(y)
            hidden = jax.checkpoint(lambda gate, x: nn.silu(gate) * x)(gate, hidden)
            hidden = dense(self, d, "gated_out")(hidden)
        else:
            hidden = constrain(dense(self, width, "mlp_in")(y), BATCH, None, "tensor")
            hidden = dense(self, d, "mlp_out")(jax.checkpoint(nn.gelu)(hidden))
        return constrain(x + gate2[:, None] * hidden, BATCH, None, None)

    def _placed(self, x: Array, name: str) -> Array:
        """Queries or keys (B, T, H, D / H), normalised, then turned; in float32."""
        kind = jnp.promote_types(x.dtype, jnp.float32)
        if self.model.qk_norm == "rms":
            x = nn.RMSNorm(dtype=kind, name=name)(x)
        if self.model.qk_norm == "layer":
            x = nn.LayerNorm(1e-5, kind, use_fast_variance=False, name=name)(x)
        x = rotate(x.astype(kind)) if self.model.rope else x
        return x.astype(self.dtype)


class FinalLayer(nn.Module):
    """Norm, shift and scale from the condition, zero-initialised projection."""

    features: int
    dtype: Any
    norm: Literal["layer", "rms"] = "layer"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        modulation = dense(self, 2 * x.shape[-1], "modulation", ZEROS)(nn.silu(c))
        modulation = constrain(modulation.astype(c.dtype), BATCH, None)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        linear = dense(self, self.features, "linear", ZEROS)
        return linear(modulate(normalised(x, self.norm, "norm_final"), shift, scale))
