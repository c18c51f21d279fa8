"""DINOv2 (Oquab et al. 2023), the encoder that REPA aligns with, channels last.

The network of `Dinov2Model` of transformers without what only training uses (dropout,
stochastic depth). `sra2_jax.weights.dinov2` reads its weights. Norms, softmax and
the residual stream are float32; matrix products run in `dtype`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sra2_jax.models import apply, shapes
from sra2_jax.models.block import block_macs, dense, layer_norm, stacked
from sra2_jax.models.dit import patchify

# Means and standard deviations of red, green and blue in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ZEROS, ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()
NORMAL = nn.initializers.truncated_normal(0.02)
GELU = partial(nn.gelu, approximate=False)


@dataclass(frozen=True)
class DINOv2Config:
    """Shape of a DINOv2 encoder; the defaults are those of dinov2-base.

    `image_size` is that of the position table. The mask token is used by DINOv2's
    training alone; it is here so that files keep all of their tensors.
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
        """Patches on a side of the position table: 37 for dinov2-base."""
        return self.image_size // self.patch_size


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (1981, eq. 4 with free a): 1 at 0, 0 at other integers and |x|>2."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _bicubic_matrix(old: int, new: int, a: float, antialias: bool) -> np.ndarray:
    """Weights (new, old) of cubic interpolation along one axis, float32.

    As torch's `interpolate(align_corners=False)`: pixels beyond the border repeat the
    last one; with antialias they are left out, rows sum to 1 again, and the kernel is
    as many times wider as the axis shrinks.
    """
    scale = old / new
    centres = (np.arange(new) + 0.5)[:, None] * scale
    if antialias:
        weights = _cubic((np.arange(old) + 0.5 - centres) / max(scale, 1.0), a)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    taps = np.floor(centres - 0.5).astype(int) + np.arange(-1, 3)
    weights = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(weights, (rows, taps.clip(0, old - 1)), _cubic(taps + 0.5 - centres, a))
    return weights.astype(np.float32)


def resize(x: Array, height: int, width: int, a: float, antialias: bool) -> Array:
    """(B, H, W, C) to (B, height, width, C), untouched if equal."""
    if x.shape[1:3] == (height, width):
        return x
    down = _bicubic_matrix(x.shape[1], height, a, antialias)
    across = _bicubic_matrix(x.shape[2], width, a, antialias)
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
    return resize(x, side, side, -0.75, antialias=False)


class EncoderBlock(nn.Module):
    """Transformer block of DINOv2 and of CLIP.

    hidden: channels of the perceptron; scaled: each branch is multiplied by a learned
    scale per channel; causal: a token attends to those up to itself alone.
    """

    heads: int
    hidden: int
    eps: float
    dtype: Any
    activation: Callable[[Array], Array] = GELU
    bias: bool = True
    scaled: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        y = layer_norm(self.eps, "norm1")(x)
        q, k, v = (
            dense(self, d, name, bias=self.bias)(y).reshape(b, n, self.heads, -1)
            for name in ("query", "key", "value")
        )
        how: dict[str, Any] = {"is_causal": self.causal, "implementation": "xla"}
        y = jax.nn.dot_product_attention(q, k, v, **how).reshape(b, n, d)
        x = x + self._scale("scale1", dense(self, d, "attention_out")(y))
        y = dense(self, self.hidden, "mlp_in")(layer_norm(self.eps, "norm2")(x))
        y = dense(self, d, "mlp_out")(self.activation(y))
        return x + self._scale("scale2", y)

    def _scale(self, name: str, y: Array) -> Array:
        return self.param(name, ONES, y.shape[-1:]) * y if self.scaled else y


class DINOv2(nn.Module):
    """Vision transformer over patches and a class token.

    Attributes:
      config: the shape.
      antialias: how the position table (37x37 in dinov2-base) is resized to another
        grid than its own. True: as REPA does (utils.py, `load_encoders`, by timm's
        `resample_abs_pos_embed`: torch's antialiased bicubic, a = -0.5); False: as
        transformers does (a = -0.75).
      scan: run the blocks as a loop, or unrolled.
      dtype: compute type of the matrix products.
    """

    config: DINOv2Config
    antialias: bool = True
    scan: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Tokens of the last layer after its norm, the class token first.

        pixels: (B, H, W, 3) as `preprocess` returns them. Returns float32
        (B, 1 + H/p * W/p, hidden_size), row-major; patch_size p divides H and W.
        """
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
        how: dict[str, Any] = {"bias": cfg.qkv_bias, "scaled": True, "name": "blocks"}
        sizes = cfg.num_attention_heads, d * cfg.mlp_ratio, cfg.layer_norm_eps
        blocks = EncoderBlock(*sizes, self.dtype, **how)
        x = stacked(blocks, x, cfg.num_hidden_layers, self.scan)
        return layer_norm(cfg.layer_norm_eps, "norm")(x)

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
        a = -0.5 if self.antialias else -0.75
        grid = resize(grid, height, width, a, self.antialias)
        return jnp.concatenate([table[:, :1], grid.reshape(1, -1, d)], axis=1)


def patch_features(
    module: DINOv2,
    params: Mapping[str, Any],
    images: UInt8[Array, "b h w 3"],
    grid: int,
) -> Float[Array, "b {grid*grid} d"]:
    """REPA's targets (`x_norm_patchtokens`): a feature for each cell of a grid.

    images: resized to grid * patch_size: 224 for ImageNet at 256 pixels and a grid of
    16, 448 at 512 pixels and 32. Returns float32, row-major, without the class token.
    """
    pixels = preprocess(images, module.config.patch_size * grid)
    return apply(module, params, pixels)[:, 1:]
