"""The diffusion transformer of SiT and DiT, channels last, one stacked block tree.

Source: the reference `SiT` network (willisma/SiT), whose checkpoints
`sra2_jax.weights.sit` reads. Norms, softmax and the residual stream are float32; matrix
products run in `dtype`; parameters are float32.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sra2_jax.sharding import BATCH, constrain

XAVIER = nn.initializers.xavier_uniform()
NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros_init()
TIME_FEATURES = 256


def _keeps_attention(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Saves cuDNN's attention with its statistics, and what is named "attention"."""
    cudnn = "dot_product_attention_fwd" in primitive.name
    return cudnn or NAMED_ATTENTION(primitive, *avals, **params)


DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
NAMED_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention")
REMAT_POLICIES = {
    "none": None,
    "dots": DOTS,
    # "dots" runs attention's forward pass once more in the backward pass: its output
    # is a product with batch dimensions, or with cuDNN no product at all.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        DOTS, _keeps_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def sincos_positions(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table (grid * grid, width), float32, row-major tokens.

    Half of the channels encode the column, then half the row; each half is
    [sin, cos] with base 10000, computed in float64 as the reference does.
    width: a multiple of 4.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def timestep_features(t: Float[Array, " b"]) -> Float[Array, "b f"]:
    """Sinusoidal features ordered [cos, sin], largest period 10000."""
    half = TIME_FEATURES // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half) / half)
    angles = t[:, None] * frequencies[None].astype(t.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def patchify(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b t d"]:
    """Image to row-major tokens; within a token (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, p * p * c)


def unpatchify(tokens: Float[Array, "b t d"], p: int) -> Float[Array, "b h w c"]:
    """Inverse of `patchify` for a square image."""
    b, t, d = tokens.shape
    n, c = round(t**0.5), d // (p * p)
    x = tokens.reshape(b, n, n, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, n * p, n * p, c)


def layer_norm(x: Array) -> Array:
    """LayerNorm without affine parameters, eps 1e-6, in float32 (or wider)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Apply adaLN's shift and scale, (B, D), to normalised tokens, (B, T, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def dense(
    module: Any, size: int, name: str, init: Any = XAVIER, bias: bool = True
) -> nn.Dense:
    """A linear layer in the compute type of the module that it belongs to."""
    return nn.Dense(size, bias, dtype=module.dtype, kernel_init=init, name=name)


def block_macs(tokens: int, width: int, hidden: int) -> int:
    """Multiply-accumulates of a transformer block for one image."""
    return tokens * width * (4 * width + 2 * hidden + 2 * tokens)


class HeadsDense(nn.Module):
    """Queries, keys and values of all heads, (B, T, H, D / H) each.

    One (D, 3D) matrix: xavier on separate q, k and v would start too large. It is
    viewed as (D, 3, H, D / H), so that a mesh can split it by heads.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array]:
        d = x.shape[-1]
        shape = (3, self.heads, d // self.heads)
        kernel = self.param("kernel", XAVIER, (d, 3 * d))
        bias = self.param("bias", ZEROS, (3 * d,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = constrain(kernel.reshape(d, *shape), None, None, "tensor", None)
        b, t, _ = x.shape

        # Three products: one of (D, 3D) would be cut and put together again by copies.
        # Of matrices, with the bias a vector: cuBLAS adds it in the same kernel.
        def product(i: int) -> Array:
            out = x @ kernel[:, i].reshape(d, d) + bias[i * d : (i + 1) * d]
            out = out.reshape(b, t, *shape[1:])
            return constrain(out, BATCH, None, "tensor", None)

        return product(0), product(1), product(2)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT)."""

    heads: int
    mlp_ratio: float
    attention: Literal["xla", "cudnn"]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        b, t, d = x.shape
        # In x's type: 1 + scale would lose half of scale's digits in bf16.
        modulation = dense(self, 6 * d, "modulation", ZEROS)(nn.silu(c))
        modulation = constrain(modulation.astype(x.dtype), BATCH, None)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)

        qkv = HeadsDense(self.heads, self.dtype, name="qkv")
        q, k, v = qkv(modulate(layer_norm(x), shift1, scale1))
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        mixed = checkpoint_name(mixed, "attention")
        mixed = dense(self, d, "attention_out")(mixed.reshape(b, t, d))
        x = constrain(x + gate1[:, None] * mixed, BATCH, None, None)

        # The ratio may come from hidden / d of a checkpoint, off by rounding.
        widen = dense(self, int(d * self.mlp_ratio + 1e-6), "mlp_in")
        hidden = widen(modulate(layer_norm(x), shift2, scale2))
        hidden = constrain(hidden, BATCH, None, "tensor")
        # Saved for the backward pass is its input alone, the tanh is computed again.
        hidden = dense(self, d, "mlp_out")(jax.checkpoint(nn.gelu)(hidden))
        return constrain(x + gate2[:, None] * hidden, BATCH, None, None)


class FinalLayer(nn.Module):
    """LayerNorm, shift and scale from the condition, zero-initialised projection."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Array:
        modulation = dense(self, 2 * x.shape[-1], "modulation", ZEROS)(nn.silu(c))
        modulation = constrain(modulation.astype(c.dtype), BATCH, None)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        linear = dense(self, self.features, "linear", ZEROS)
        return linear(modulate(layer_norm(x), shift, scale))


class DiT(nn.Module):
    """SiT/DiT backbone on latents of any square size and channel number.

    Attributes:
      size: side of the latent grid; channels: latent channels.
      patch_size, width, depth, heads, mlp_ratio: as in DiT.
      num_classes: labels run over [0, num_classes); num_classes is the null label.
      time_scale: factor on t before its sinusoidal features (reference: 1).
      learn_sigma: predict 2 * channels and drop the second half, as published SiT and
        DiT weights do.
      scan: run the blocks as a loop (fast compile) or unrolled (less memory without
        rematerialisation); the parameters are the same stacked tree either way.
      remat: "none", "dots", "attention" or "full", see `REMAT_POLICIES`.
      attention: "xla" or "cudnn".
      dtype: compute type of the matrix products.
    """

    size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    time_scale: float = 1.0
    learn_sigma: bool = False
    scan: bool = True
    remat: str = "none"
    attention: Literal["xla", "cudnn"] = "xla"
    dtype: Any = jnp.float32

    @property
    def grid(self) -> int:
        """Tokens on a side."""
        return self.size // self.patch_size

    def macs(self, depth: int, final: bool = True) -> int:
        """Multiply-accumulates of the first `depth` blocks for one image."""
        d, patch = self.width, self.patch_size**2 * self.channels
        tokens, hidden = self.grid**2, int(d * self.mlp_ratio + 1e-6)
        block = block_macs(tokens, d, hidden) + d * 6 * d
        ends = tokens * patch * d + TIME_FEATURES * d + d * d
        if final:
            out = patch * (2 if self.learn_sigma else 1)
            ends += d * 2 * d + tokens * d * out
        return ends + depth * block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        features: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "b h w c"], dict[int, Array], Float[Array, "b d"]]:
        """Predict from x_t.

        Args:
          x: noisy latents; t: times in [0, 1], 0 = data, 1 = noise.
          y: labels, num_classes for the null label.
          features: 1-based numbers of the blocks whose output is wanted.

        Returns:
          prediction (float32), {block: tokens (B, T, width)}, the condition vector.
        """
        p, d = self.patch_size, self.width
        tokens = dense(self, d, "patch")(patchify(x, p))
        # Adding the float32 table makes the residual stream float32, as it is under
        # the reference's autocast.
        tokens = tokens + sincos_positions(d, self.grid).astype(x.dtype)
        tokens = constrain(tokens, BATCH, None, None)
        c = constrain(self._condition(t, y), BATCH, None)
        tokens, kept = self._blocks(tokens, c, features)
        channels = self.channels * (2 if self.learn_sigma else 1)
        out = FinalLayer(p * p * channels, self.dtype, name="final")(tokens, c)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return unpatchify(out, p)[..., : self.channels], kept, c

    def _condition(self, t: Array, y: Array) -> Array:
        d = self.width
        hidden = timestep_features(t * self.time_scale)
        hidden = nn.silu(dense(self, d, "time_in", NORMAL)(hidden))
        hidden = dense(self, d, "time_out", NORMAL)(hidden)
        labels = nn.Embed(self.num_classes + 1, d, embedding_init=NORMAL, name="label")
        return hidden + labels(y)

    def _blocks(
        self, tokens: Array, c: Array, features: tuple[int, ...]
    ) -> tuple[Array, dict[int, Array]]:
        """Run the stack; keep the asked blocks' outputs in the carry: one token array
        for each, where returning every block's output would cost `depth` of them."""
        block_type = Block
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            # Unrolled code needs the CSE barrier, or XLA would undo the remat.
            block_type = nn.remat(Block, policy=policy, prevent_cse=not self.scan)

        def body(block: nn.Module, carry: Any, number: Any) -> tuple[Any, None]:
            x, kept = carry
            x = block(x, c)
            return (x, {n: jnp.where(number == n, x, k) for n, k in kept.items()}), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=1 if self.scan else self.depth,
        )
        shape = self.heads, self.mlp_ratio, self.attention, self.dtype
        block = block_type(*shape, name="blocks")
        kept = {n: jnp.zeros_like(tokens) for n in features}
        # NumPy's, a constant: unrolled, the compiler knows which blocks are kept.
        numbers = np.arange(1, self.depth + 1)
        (tokens, kept), _ = scan(block, (tokens, kept), numbers)
        return tokens, kept
