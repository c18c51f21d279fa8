"""CLIP's text encoder (Radford et al. 2021), which conditions text to image.

The network of `CLIPTextModel` of transformers; `sra2_jax.weights.clip` reads its
weights. Norms, softmax and the residual stream are float32; matrix products run in
`dtype`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sra2_jax.models import shapes
from sra2_jax.models.block import block_macs, layer_norm, stacked
from sra2_jax.models.dinov2 import GELU, EncoderBlock

NORMAL = nn.initializers.normal(0.02)
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": GELU,
}


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of one of CLIP's encoders; all defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is none of {', '.join(ACTIVATIONS)}")

    def block(self, dtype: Any, causal: bool) -> EncoderBlock:
        """Inside a module: one of its layers."""
        sizes = self.num_attention_heads, self.intermediate_size, self.layer_norm_eps
        how: dict[str, Any] = {"activation": ACTIVATIONS[self.hidden_act]}
        return EncoderBlock(*sizes, dtype, **how, causal=causal, name="blocks")


@dataclass(frozen=True)
class CLIPTextConfig(CLIPConfig):
    vocab_size: int = 49408
    max_position_embeddings: int = 77


class CLIPText(nn.Module):
    """Text encoder over the numbers of tokens; dtype: of the matrix products."""

    config: CLIPTextConfig
    scan: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """The last hidden state, after the last norm: (B, N, hidden_size) float32.

        tokens: at most max_position_embeddings of a text, filled up with its end.
        """
        cfg, n = self.config, tokens.shape[1]
        d, length = cfg.hidden_size, cfg.max_position_embeddings
        x = nn.Embed(cfg.vocab_size, d, embedding_init=NORMAL, name="tokens")(tokens)
        positions = nn.Embed(length, d, embedding_init=NORMAL, name="positions")
        x = x + positions(jnp.arange(n))
        blocks = cfg.block(self.dtype, causal=True)
        x = stacked(blocks, x, cfg.num_hidden_layers, self.scan)
        return layer_norm(cfg.layer_norm_eps, "norm")(x)

    def shapes(self) -> Any:
        """ShapeDtypeStructs of its parameters; none is allocated."""
        return shapes(self, jax.ShapeDtypeStruct((1, 1), jnp.int32))

    def macs(self) -> int:
        """Multiply-accumulates for one text of full length."""
        c = self.config
        sizes = c.max_position_embeddings, c.hidden_size, c.intermediate_size
        return c.num_hidden_layers * block_macs(*sizes)
