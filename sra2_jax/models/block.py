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


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm with weights, in float32; in two passes, as tokens may have huge
    channels."""
    return nn.LayerNorm(eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def stacked(block: nn.Module, x: Array, length: int, scan: bool) -> Array:
    """x (B, N, D) through `length` blocks of one stacked tree, looped or unrolled."""
    run = nn.scan(
        lambda block, carry, _: (block(carry), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        unroll=1 if scan else length,
    )
    x, _ = run(block, x, None)
    return x


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
        qkv, rest = before_attention(self, x, c)
        return after_attention(self, x, attend(self, *qkv), rest)


def before_attention(
    block: Any, x: Array, c: Array, stream: str = "", last: bool = False
) -> tuple[list[Array], list[Any]]:
    """Inside a block: queries, keys and values (B, T, H, D / H) of a stream of tokens
    (B, T, D), and the modulation of what follows.

    stream: in front of the names of its layers; last: nothing follows.
    """
    m, d = block.model, x.shape[-1]
    # In x's type: 1 + scale would lose half of scale's digits in bf16.
    few, most = (2, 6) if m.shift else (1, 4)
    n = few if last else most
    modulation = dense(block, n * d, f"{stream}modulation", ZEROS)(nn.silu(c))
    modulation = constrain(modulation.astype(x.dtype), BATCH, None)
    parts: list[Any] = jnp.split(modulation, n, axis=-1)
    if not m.shift:
        parts = [None, *parts[:2], None, *parts[2:]]
    shift, scale, *rest = parts

    split = SplitDense(3, (m.heads, d // m.heads), block.dtype, name=f"{stream}qkv")
    normal = normalised(x, m.norm, f"{stream}norm1")
    q, k, v = split(modulate(normal, shift, scale))
    rope = m.rope and not stream

    def placed(x: Array, name: str) -> Array:
        """Queries or keys, normalised, then turned; in float32."""
        kind = jnp.promote_types(x.dtype, jnp.float32)
        if m.qk_norm == "rms":
            x = nn.RMSNorm(dtype=kind, name=f"{stream}{name}")(x)
        if m.qk_norm == "layer":
            norm = nn.LayerNorm(1e-5, kind, use_fast_variance=False, name=stream + name)
            x = norm(x)
        x = rotate(x.astype(kind)) if rope else x
        return x.astype(block.dtype)

    return [placed(q, "q_norm"), placed(k, "k_norm"), v], rest


def attend(block: Any, q: Array, k: Array, v: Array) -> Array:
    """Attention of all heads (B, T, H, D / H): (B, T, D)."""
    mixed = jax.nn.dot_product_attention(q, k, v, implementation=block.attention)
    return checkpoint_name(mixed, "attention").reshape(*q.shape[:2], -1)


def after_attention(
    block: Any, x: Array, mixed: Array, rest: list[Any], stream: str = ""
) -> Array:
    """Inside a block: the stream (B, T, D) after its attention's output and its
    perceptron; the others as of `before_attention`."""
    m, d = block.model, x.shape[-1]
    gate1, shift, scale, gate2 = rest
    mixed = dense(block, d, f"{stream}attention_out")(mixed)
    x = constrain(x + gate1[:, None] * mixed, BATCH, None, None)

    y = modulate(normalised(x, m.norm, f"{stream}norm2"), shift, scale)
    width = hidden_width(m)
    # Saved for the backward pass are inputs alone, the rest is computed again.
    if m.mlp == "swiglu":
        split = SplitDense(2, (width,), block.dtype, name=f"{stream}gated_in")
        hidden = jax.checkpoint(lambda gate, x: nn.silu(gate) * x)(*split(y))
        hidden = dense(block, d, f"{stream}gated_out")(hidden)
    else:
        hidden = dense(block, width, f"{stream}mlp_in")(y)
        hidden = jax.checkpoint(nn.gelu)(constrain(hidden, BATCH, None, "tensor"))
        hidden = dense(block, d, f"{stream}mlp_out")(hidden)
    return constrain(x + gate2[:, None] * hidden, BATCH, None, None)


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
