"""MMDiT, the diffusion transformer of Stable Diffusion 3, as REPA trains it.

Source: `MMDiT` of REPA (sihyun-yu/REPA), without pooled text: an image's and a text's
tokens go through blocks of their own and attend to each other.
"""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from sra2_jax.config import Model
from sra2_jax.models.block import (
    after_attention,
    attend,
    before_attention,
    dense,
    hidden_width,
)
from sra2_jax.models.dit import DiT

TEXT = "text_"  # in front of the layers of the text's stream


class JointBlock(nn.Module):
    """A `Block` for each stream, attention over both; in the last one the text's only
    feeds attention."""

    model: Model
    attention: Literal["xla", "cudnn"]
    dtype: Any
    last: bool = False

    @nn.compact
    def __call__(self, x: tuple[Array, Array], c: Array) -> tuple[Array, Array]:
        image, text = x
        own, rest = before_attention(self, image, c)
        others, text_rest = before_attention(self, text, c, TEXT, self.last)
        pairs = zip(own, others, strict=True)
        mixed = attend(self, *(jnp.concatenate(pair, axis=1) for pair in pairs))
        count = image.shape[1]
        image = after_attention(self, image, mixed[:, :count], rest)
        if not self.last:
            text = after_attention(self, text, mixed[:, count:], text_rest, TEXT)
        return image, text


class MMDiT(DiT):
    """`DiT` with a text for a label: `y` is its features, (B, text_tokens, text_width).

    num_classes does not count; of the tree `blocks` lacks the last, which is `last`.
    """

    apart: ClassVar[int] = 1
    text_tokens: int = 77
    text_width: int = 768

    @property
    def tokens(self) -> int:
        return super().tokens + self.text_tokens

    def inputs(self) -> tuple[Array, Array, Array]:
        text = jnp.zeros((1, self.text_tokens, self.text_width))
        return *super().inputs()[:2], text

    def macs(self, depth: int, final: bool = True) -> int:
        m, n, text, d = self.model, self.grid**2, self.text_tokens, self.model.width
        matrices = 4 * d * d + d * hidden_width(m) * (3 if m.mlp == "swiglu" else 2)
        modulation = (6 if m.shift else 4) * d * d
        joint = text * matrices + modulation + 2 * d * ((n + text) ** 2 - n * n)
        total = super().macs(depth, final) + text * self.text_width * d + depth * joint
        if depth == m.depth:  # of the last one's text no more than what attention takes
            total -= text * (matrices - 3 * d * d) + modulation * 2 // 3
        return total

    def _condition(self, t: Array, y: Array) -> Array:
        return self._time(t)

    def _blocks(
        self,
        tokens: Array,
        c: Array,
        y: Float[Array, "b l f"],
        features: tuple[int, ...],
    ) -> tuple[Array, dict[int, Array]]:
        depth, text = self.model.depth, dense(self, self.model.width, "text")(y)
        x = tokens, text.astype(tokens.dtype)
        x, kept = self._stack(JointBlock, depth - 1, x, c, features)
        block = self._rematted(JointBlock, scan=False)
        last = block(self.model, self.attention, self.dtype, last=True, name="last")
        tokens, _ = last(x, c)
        return tokens, kept | {n: tokens for n in features if n == depth}


def torch_default(params: Any, key: jax.Array) -> Any:
    """Every linear layer as PyTorch makes it, which the reference leaves as it is:
    kernel and bias uniform within 1 / sqrt(inputs)."""
    leaves = traverse_util.flatten_dict(params)
    for i, (path, leaf) in enumerate(sorted(leaves.items())):
        kernel = leaves.get((*path[:-1], "kernel"))
        if kernel is not None:
            bound, own = kernel.shape[-2] ** -0.5, jax.random.fold_in(key, i)
            drawn = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
            leaves[path] = drawn
    return traverse_util.unflatten_dict(leaves)
