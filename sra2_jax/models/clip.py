"""CLIP (Radford et al. 2021): its text encoder, which conditions text to image, and
both halves, which tell how well an image shows what a text says.

The networks of `CLIPTextModel` and `CLIPModel` of transformers; `sra2_jax.weights.clip`
reads their weights. Norms, softmax and the residual stream are float32; matrix products
run in `dtype`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from sra2_jax.models import shapes
from sra2_jax.models.block import block_macs, dense, layer_norm, stacked
from sra2_jax.models.dinov2 import GELU, EncoderBlock, resize
from sra2_jax.models.dit import patchify

# Means and standard deviations of red, green and blue in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMAL = nn.initializers.normal(0.02)
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": GELU,
}


@dataclass(frozen=True)
class Half:
    """Shape of an encoder; all defaults are transformers'."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is none of {', '.join(ACTIVATIONS)}")

    def block(self, dtype: Any, causal: bool) -> EncoderBlock:
        """Inside a module: one of its layers."""
        sizes = self.num_attention_heads, self.intermediate_size, self.layer_norm_eps
        how: dict[str, Any] = {"activation": ACTIVATIONS[self.hidden_act]}
        return EncoderBlock(*sizes, dtype, **how, causal=causal, name="blocks")


@dataclass(frozen=True)
class CLIPTextConfig(Half):
    vocab_size: int = 49408
    max_position_embeddings: int = 77


@dataclass(frozen=True)
class CLIPVisionConfig(Half):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32


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


class CLIPVision(nn.Module):
    """Image encoder: the class token of a vision transformer, projected."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """images: of equal squares, resized to the encoder's side."""
        cfg, b, d = self.config, len(images), self.config.hidden_size
        side = cfg.image_size
        pixels = resize(images.astype(jnp.float32) / 255, side, side, -0.5, True)
        pixels = (pixels.clip(0, 1) - jnp.array(MEAN)) / jnp.array(STD)
        x = dense(self, d, "patch", bias=False)(patchify(pixels, cfg.patch_size))
        token = self.param("class_token", NORMAL, (d,))
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x], axis=1)
        x = x + nn.Embed(x.shape[1], d, name="positions")(jnp.arange(x.shape[1]))
        x = layer_norm(cfg.layer_norm_eps, "first_norm")(x)
        blocks = cfg.block(self.dtype, causal=False)
        x = stacked(blocks, x, cfg.num_hidden_layers, scan=True)[:, 0]
        x = layer_norm(cfg.layer_norm_eps, "norm")(x)
        return dense(self, cfg.projection_dim, "projection", bias=False)(x)


class CLIP(nn.Module):
    """Both halves: how well images show what texts say."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "b h w 3"], tokens: Int[Array, "b n"]
    ) -> Float[Array, " b"]:
        """The cosine of image and text times the learned scale, 100 in CLIP's own
        weights; a text's features are those of its end, the highest number."""
        seen = CLIPVision(self.vision, name="vision")(images)
        read = CLIPText(self.text, name="text")(tokens)
        read = jnp.take_along_axis(read, tokens.argmax(1)[:, None, None], 1)[:, 0]
        size = self.text.projection_dim
        said = nn.Dense(size, use_bias=False, name="text_projection")(read)
        cosine = (seen * said).sum(-1)
        cosine /= jnp.linalg.norm(seen, axis=-1) * jnp.linalg.norm(said, axis=-1)
        return jnp.exp(self.param("logit_scale", nn.initializers.ones, ())) * cosine

    def shapes(self) -> Any:
        """ShapeDtypeStructs of its parameters; none is allocated."""
        images = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.uint8)
        return shapes(self, images, jax.ShapeDtypeStruct((1, 1), jnp.int32))
