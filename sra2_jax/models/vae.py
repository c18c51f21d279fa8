"""The image autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

`AutoencoderKL` of diffusers 0.42 (the network of sd-vae-ft-ema and -mse, SDXL, SD3 and
FLUX) with NHWC arrays. Module names are diffusers' names with `.N` written `_N`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax.models import shapes

Layer = Callable[..., nn.Module]  # takes its name
# levels of the encoder and decoder, without and with attention after each resnet
DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers DiagonalGaussianDistribution


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the defaults are those of sd-vae-ft-ema.

    A latent z goes to the diffusion model as (z - shift_factor - latents_mean) /
    latents_std * scaling_factor, with a mean and deviation for each channel, or without
    both. The network never applies these numbers, they only travel with it.

    Raises ValueError: other than a number for each channel, or a kind for each level.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    down_block_types: tuple[str, ...] = ()  # by default DOWN[0] on each level
    up_block_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        stated = {len(self.latents_mean), len(self.latents_std)}
        if stated not in ({0}, {self.latent_channels}):
            raise ValueError(
                "latents_mean, latents_std have a number for each channel, or none"
            )
        for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
            types = getattr(self, name) or kinds[:1] * levels
            object.__setattr__(self, name, types)
            if len(types) != levels or {*types} - {*kinds}:
                raise ValueError(f"{name} has one of {kinds} for each level: {types}")

    @property
    def downsample(self) -> int:
        """Pixels per latent position and axis: 8 for sd-vae-ft-ema."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.GroupNorm):
    """Flax's, statistics in float32. In two passes: E[x^2] - E[x]^2 loses the digits
    that the golden cases ask for."""

    epsilon: float = 1e-6
    use_fast_variance: bool = False


class NormSiLU(GroupNorm):
    """Followed by SiLU."""

    def __call__(self, x: Float[Array, "b h w c"], **named: Any) -> Array:
        return nn.silu(super().__call__(x, **named))


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a skip, projected where the width changes."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        norm = partial(NormSiLU, self.groups, dtype=self.dtype)
        conv = partial(nn.Conv, self.features, dtype=self.dtype)
        h = conv((3, 3), padding=1, name="conv1")(norm(name="norm1")(x))
        h = conv((3, 3), padding=1, name="conv2")(norm(name="norm2")(h))
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions with a single head as wide as the features."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        linear = partial(nn.Dense, x.shape[-1], dtype=self.dtype)
        h = GroupNorm(self.groups, dtype=self.dtype, name="group_norm")(x)
        h = h.reshape(len(x), -1, 1, x.shape[-1])
        q, k, v = (linear(name=name)(h) for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return x + linear(name="to_out_0")(h).reshape(x.shape)


class Upsample(nn.Module):
    """Each pixel doubled along both axes, then a convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv3(x.shape[-1], self.dtype)(name="conv")(x)


class Chain(nn.Module):
    """Layers one after the other, each made by its name in the file of weights."""

    layers: Mapping[str, Layer]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        for name, layer in self.layers.items():
            x = layer(name=name)(x)
        return x


def conv3(features: int, dtype: Any, strides: int = 1, padding: Any = 1) -> Layer:
    how = {"strides": strides, "padding": padding, "dtype": dtype}
    return partial(nn.Conv, features, (3, 3), **how)


def blocks(
    cfg: VAEConfig, dtype: Any, width: int, count: int, attentions: int = 0
) -> dict[str, Layer]:
    """The resnets of a resolution, attention after each of the first ones."""
    layers: dict[str, Layer] = {}
    groups = cfg.norm_num_groups
    for i in range(count):
        layers[f"resnets_{i}"] = partial(ResnetBlock, width, groups, dtype)
        if i < attentions:
            layers[f"attentions_{i}"] = partial(AttentionBlock, groups, dtype)
    return layers


def coder(cfg: VAEConfig, dtype: Any, up: bool) -> Chain:
    """The decoder, or the encoder: one resnet less on each level. Each level but the
    last changes the resolution."""
    widths = cfg.block_out_channels[:: -1 if up else 1]
    kinds = cfg.up_block_types if up else cfg.down_block_types
    count = cfg.layers_per_block + up
    levels: dict[str, Layer] = {}
    for i, width in enumerate(widths):
        attentions = count * (kinds[i] in (DOWN[1], UP[1]))
        level = blocks(cfg, dtype, width, count, attentions)
        if i < len(widths) - 1 and up:
            level["upsamplers_0"] = partial(Upsample, dtype)
        elif i < len(widths) - 1:
            # Padded on the lower and right side only.
            half = conv3(width, dtype, 2, ((0, 1), (0, 1)))
            level["downsamplers_0"] = partial(Chain, {"conv": half})
        levels[f"{'up' if up else 'down'}_blocks_{i}"] = partial(Chain, level)
    attentions = int(cfg.mid_block_add_attention)
    middle = blocks(cfg, dtype, cfg.block_out_channels[-1], 2, attentions)
    mid_block: dict[str, Layer] = {"mid_block": partial(Chain, middle)}
    inner = mid_block | levels if up else levels | mid_block
    last = cfg.out_channels if up else 2 * cfg.latent_channels
    outer: dict[str, Layer] = {
        "conv_norm_out": partial(NormSiLU, cfg.norm_num_groups, dtype=dtype),
        "conv_out": conv3(last, dtype),
    }
    return Chain({"conv_in": conv3(widths[0], dtype)} | inner | outer)


class AutoencoderKL(nn.Module):
    """Variational autoencoder between images in [-1, 1] and latents, NHWC.

    Convolutions and attention run in `dtype`; parameters, group norms, softmax and all
    results are float32.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        conv1 = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        self.encoder = coder(cfg, self.dtype, up=False)
        self.decoder = coder(cfg, self.dtype, up=True)
        if cfg.use_quant_conv:
            self.quant_conv = conv1(2 * cfg.latent_channels)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = conv1(cfg.latent_channels)

    def shapes(self) -> Any:
        """ShapeDtypeStructs of its parameters; none is allocated."""
        side, channels = self.config.downsample, self.config.in_channels
        image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        return shapes(self, image)

    def moments(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b h w moments"]:
        """Posterior mean, then log variance before clipping, along the last axis, of
        images in [-1, 1]."""
        out = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            out = self.quant_conv(out)
        return out.astype(jnp.float32)

    def encode(
        self, images: Float[Array, "b height width c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and standard deviation of the posterior, unscaled, of images in
        [-1, 1]."""
        mean, logvar = jnp.split(self.moments(images), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(
        self, latents: Float[Array, "b h w z"]
    ) -> Float[Array, "b height width c"]:
        """Images of unscaled latents, about [-1, 1], not clipped."""
        h = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            h = self.post_quant_conv(h)
        return self.decoder(h).astype(jnp.float32)

    def __call__(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b height width d"]:
        """Reconstruction from the posterior mean; reaches every parameter for init."""
        return self.decode(self.encode(images)[0])
