"""DINOv2 (Oquab et al. 2023), the encoder that REPA aligns with, channels last.

The network of `Dinov2Model` of transformers without what only training uses (dropout,
stochastic depth). Norms, softmax and the residual stream are float32; matrix products
run in `dtype`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sra2_jax.models import apply, shapes
from sra2_jax.models.block import block_macs, dense
from sra2_jax.models.dit import patchify

# Means and standard deviations of red, green and blue in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ZEROS, ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()
NORMAL = nn.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class DINOv2Config:
    """Shape of a DINOv2 encoder; the defaults are those of dinov2-base.

    `image_size` is that of the position table. The mask token is used in training alone
    and is here so that files keep all of their tensors.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    use_mask_token: bool = True

    @property
    def grid(self) -> int:
        """Patches on a side of the position table."""
        return self.image_size // self.patch_size


def _resize(x: Array, height: int, width: int, antialias: bool) -> Array:
    """(B, H, W, C) to (B, height, width, C) by PyTorch's bicubic rule."""
    if x.shape[1:3] == (height, width):
        return x

    def weights(old: int, new: int) -> np.ndarray:
        with jax.enable_x64(True), jax.ensure_compile_time_eval():
            shape = new, old
            found = jax.image.resize(np.eye(old), shape, "cubic-pytorch", antialias)
        return np.asarray(found, np.float32)

    down, across = weights(x.shape[1], height), weights(x.shape[2], width)
    # Accelerators would otherwise round the weights to bf16 or TF32.
    return jnp.einsum("ih,jw,bhwc->bijc", down, across, x, precision="highest")


def standardise(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Pixels in [0, 1] with ImageNet's mean removed, over its standard deviation."""
    return (pixels - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


def preprocess(
    images: UInt8[Array, "b h w 3"], side: int
) -> Float[Array, "b {side} {side} 3"]:
    """What the encoder takes, float32: standardised, then resized without antialiasing,
    as `preprocess_raw_image` of REPA's train.py."""
    x = standardise(images.astype(jnp.float32) / 255)
    return _resize(x, side, side, antialias=False)


def layer_norm(config: DINOv2Config, name: str) -> nn.LayerNorm:
    """LayerNorm in float32; in two passes, as tokens may have huge channels."""
    return nn.LayerNorm(
        config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class Block(nn.Module):
    """Transformer block, each branch multiplied by a learned scale per channel."""

    config: DINOv2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        cfg = self.config
        b, n, d = x.shape
        y = layer_norm(cfg, "norm1")(x)
        split = b, n, cfg.num_attention_heads, -1
        q, k, v = (
            dense(self, d, name, bias=cfg.qkv_bias)(y).reshape(split)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        y = dense(self, d, "attention_out")(y.reshape(b, n, d))
        x = x + self.param("scale1", ONES, (d,)) * y
        y = dense(self, d * cfg.mlp_ratio, "mlp_in")(layer_norm(cfg, "norm2")(x))
        y = dense(self, d, "mlp_out")(nn.gelu(y, approximate=False))
        return x + self.param("scale2", ONES, (d,)) * y


class DINOv2(nn.Module):
    """Vision transformer over patches and a class token.

    Attributes:
      config: the shape.
      antialias: how the position table (37x37 in dinov2-base) is resized to another
        grid than its own. True: as REPA does (utils.py, `load_encoders`, by timm's
        `resample_abs_pos_embed`); False: as transformers does.
      scan: run the blocks as a loop, or unrolled.
    """

    config: DINOv2Config
    antialias: bool = True
    scan: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Tokens of the last layer after its norm, float32, the class token first, then
        row-major. pixels: as of `preprocess`; patch_size divides H and W."""
        cfg = self.config
        p, d = cfg.patch_size, cfg.hidden_size
        b, height, width, _ = pixels.shape
        x = dense(self, d, "patch")(patchify(pixels, p))
        if cfg.use_mask_token:
            self.param("mask_token", ZEROS, (1, d))
        token = self.param("class_token", NORMAL, (1, 1, d))
        token = jnp.broadcast_to(token, (b, 1, d))
        x = jnp.concatenate([token, x.astype(jnp.float32)], axis=1)
        x = x + self._positions(height // p, width // p)
        scan = nn.scan(
            lambda block, carry, _: (block(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_hidden_layers,
            unroll=1 if self.scan else cfg.num_hidden_layers,
        )
        x, _ = scan(Block(cfg, self.dtype, name="blocks"), x, None)
        return layer_norm(cfg, "norm")(x)

    def shapes(self) -> Any:
        """ShapeDtypeStructs of its parameters; none is allocated."""
        side = self.config.patch_size
        return shapes(self, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))

    def macs(self, grid: int) -> int:
        """Multiply-accumulates for one image of grid x grid patches."""
        c = self.config
        d = c.hidden_size
        block = block_macs(grid**2 + 1, d, d * c.mlp_ratio)
        return grid**2 * 3 * c.patch_size**2 * d + c.num_hidden_layers * block

    def _positions(self, height: int, width: int) -> Array:
        """The table (1, 1 + height * width, D), resized where its grid differs."""
        side, d = self.config.grid, self.config.hidden_size
        table = jnp.asarray(self.param("positions", NORMAL, (1, 1 + side**2, d)))
        grid = table[:, 1:].reshape(1, side, side, d)
        grid = _resize(grid, height, width, self.antialias)
        return jnp.concatenate([table[:, :1], grid.reshape(1, -1, d)], axis=1)


def patch_features(
    module: DINOv2,
    params: Mapping[str, Any],
    images: UInt8[Array, "b h w 3"],
    grid: int,
) -> Float[Array, "b {grid*grid} d"]:
    """REPA's targets (`x_norm_patchtokens`), float32, row-major: a feature for each
    cell of a grid of patches, to which images are resized."""
    pixels = preprocess(images, module.config.patch_size * grid)
    return apply(module, params, pixels)[:, 1:]
