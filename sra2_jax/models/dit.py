"""The diffusion transformer of SiT and DiT, channels last, one stacked block tree.

Source: the reference `SiT` network (willisma/SiT), whose checkpoints
`sra2_jax.weights.sit` reads.
"""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sra2_jax.config import Model
from sra2_jax.models.block import Block, FinalLayer, block_macs, dense, hidden_width
from sra2_jax.sharding import BATCH, constrain

NORMAL = nn.initializers.normal(0.02)
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


class DiT(nn.Module):
    """SiT/DiT backbone on latents of any square size and channel number.

    Attributes:
      model: the keys of the config; its attention and dtype do not count. With
        learn_sigma 2 * channels are predicted and the second half dropped, as published
        SiT and DiT weights do. Blocks unrolled or in a loop have the same stacked tree.
      size: side of the latent grid; channels: latent channels.
      num_classes: labels run over [0, num_classes); num_classes is the null label.
      dtype: compute type of the matrix products.
    """

    model: Model
    size: int
    channels: int
    num_classes: int
    attention: Literal["xla", "cudnn"] = "xla"
    dtype: Any = jnp.float32

    apart: ClassVar[int] = 0  # blocks that are not in the stack

    @property
    def grid(self) -> int:
        """Tokens on a side."""
        return self.size // self.model.patch_size

    @property
    def tokens(self) -> int:
        """That attend to each other."""
        return self.grid**2

    def macs(self, depth: int, final: bool = True) -> int:
        """Multiply-accumulates of the first `depth` blocks for one image."""
        m, tokens, d = self.model, self.grid**2, self.model.width
        patch = m.patch_size**2 * self.channels
        block = block_macs(tokens, d, hidden_width(m), 3 if m.mlp == "swiglu" else 2)
        block += d * (6 if m.shift else 4) * d
        ends = tokens * patch * d + TIME_FEATURES * d + d * d
        if final:
            out = patch * (2 if m.learn_sigma else 1)
            ends += d * 2 * d + tokens * d * out
        return ends + depth * block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"] | Float[Array, "b l f"],
        features: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "b h w c"], dict[int, Array], Float[Array, "b d"]]:
        """Prediction (float32), {block: tokens (B, T, width)}, the condition vector.

        x: noisy latents; t: times in [0, 1], 0 = data, 1 = noise; y: labels, or of
        `MMDiT` a text's features; features: 1-based numbers of the blocks whose output
        is wanted.
        """
        p, d = self.model.patch_size, self.model.width
        tokens = dense(self, d, "patch")(patchify(x, p))
        # Adding the float32 table makes the residual stream float32, as it is under
        # the reference's autocast.
        tokens = tokens + sincos_positions(d, self.grid).astype(x.dtype)
        tokens = constrain(tokens, BATCH, None, None)
        c = constrain(self._condition(t, y), BATCH, None)
        tokens, kept = self._blocks(tokens, c, y, features)
        channels = self.channels * (2 if self.model.learn_sigma else 1)
        final = FinalLayer(p * p * channels, self.dtype, self.model.norm, name="final")
        out = final(tokens, c)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return unpatchify(out, p)[..., : self.channels], kept, c

    def inputs(self) -> tuple[Array, Array, Array]:
        """Zeros of a batch of 1: latents, times, conditions."""
        x = jnp.zeros((1, self.size, self.size, self.channels))
        return x, jnp.zeros(1), jnp.zeros(1, int)

    def _time(self, t: Array) -> Array:
        hidden = timestep_features(t * self.model.time_scale)
        hidden = nn.silu(dense(self, self.model.width, "time_in", NORMAL)(hidden))
        return dense(self, self.model.width, "time_out", NORMAL)(hidden)

    def _condition(self, t: Array, y: Array) -> Array:
        sizes = self.num_classes + 1, self.model.width
        labels = nn.Embed(*sizes, embedding_init=NORMAL, name="label")
        return self._time(t) + labels(y)

    def _blocks(
        self, tokens: Array, c: Array, y: Array, features: tuple[int, ...]
    ) -> tuple[Array, dict[int, Array]]:
        return self._stack(Block, self.model.depth, tokens, c, features)

    def _rematted(self, block: Any, scan: bool) -> Any:
        """A class of blocks that computes again what the config says."""
        if self.model.remat == "none":
            return block
        policy = REMAT_POLICIES[self.model.remat]
        # Unrolled code needs the CSE barrier, or XLA would undo the remat.
        return nn.remat(block, policy=policy, prevent_cse=not scan)

    def _stack(
        self, block: Any, length: int, x: Any, c: Array, features: tuple[int, ...]
    ) -> tuple[Any, dict[int, Array]]:
        """Run `length` blocks of a class on x, the image's tokens or these and others.
        The asked blocks' outputs are kept in the carry: one token array for each, where
        returning every block's output would cost `length` of them."""

        def body(block: nn.Module, carry: Any, number: Any) -> tuple[Any, None]:
            x, kept = carry
            x = block(x, c)
            tokens = jax.tree.leaves(x)[0]
            kept = {n: jnp.where(number == n, tokens, k) for n, k in kept.items()}
            return (x, kept), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            unroll=1 if self.model.scan else length,
        )
        block = self._rematted(block, self.model.scan)
        blocks = block(self.model, self.attention, self.dtype, name="blocks")
        kept = {n: jnp.zeros_like(jax.tree.leaves(x)[0]) for n in features}
        # NumPy's, a constant: unrolled, the compiler knows which blocks are kept.
        numbers = np.arange(1, length + 1)
        (x, kept), _ = scan(blocks, (x, kept), numbers)
        return x, kept
