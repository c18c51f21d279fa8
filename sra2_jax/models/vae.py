"""The image autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

`AutoencoderKL` of diffusers 0.42 (the network of sd-vae-ft-ema and -mse, SDXL, SD3 and
FLUX) with NHWC arrays. Module names are diffusers' names with `.N` written `_N`, so
that `sra2_jax.weights` converts weights by rule instead of by table.
"""

import math
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
NORM_EPS = 1e-6
# levels of the encoder and decoder, without and with attention after each resnet
DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers DiagonalGaussianDistribution


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the defaults are those of sd-vae-ft-ema.

    A latent z goes to the diffusion model as (z - shift_factor) * scaling_factor, with
    `latents_mean` and `latents_std` of each channel, or none, as (z - shift_factor -
    latents_mean) / latents_std * scaling_factor; the network itself never applies these
    numbers, they only travel with it.

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


class GroupNorm(nn.Module):
    """Group normalisation with statistics in float32, result in `dtype`, then SiLU."""

    groups: int
    dtype: Any
    silu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        # Two passes: E[x^2] - E[x]^2 loses the digits the golden cases ask for.
        mean = grouped.mean((1, 2, 4), keepdims=True)
        centred = grouped - mean
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
        normed = (normed * scale + bias).astype(self.dtype)
        return nn.silu(normed) if self.silu else normed


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a skip, projected where the width changes."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        norm = partial(GroupNorm, self.groups, self.dtype)
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
        batch, height, width, channels = x.shape
        linear = partial(nn.Dense, channels, dtype=self.dtype)
        h = GroupNorm(self.groups, self.dtype, silu=False, name="group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (linear(name=name)(h) for name in ("to_q", "to_k", "to_v"))
        scores = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(channels)).astype(self.dtype)
        h = linear(name="to_out_0")(jnp.einsum("bts,bsc->btc", weights, v))
        return x + h.reshape(x.shape)


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


def mid_block(cfg: VAEConfig, dtype: Any) -> Layer:
    attentions = int(cfg.mid_block_add_attention)
    return partial(Chain, blocks(cfg, dtype, cfg.block_out_channels[-1], 2, attentions))


def outputs(cfg: VAEConfig, dtype: Any, features: int) -> dict[str, Layer]:
    norm = partial(GroupNorm, cfg.norm_num_groups, dtype)
    return {"conv_norm_out": norm, "conv_out": conv3(features, dtype)}


def encoder(cfg: VAEConfig, dtype: Any) -> Chain:
    """Images to twice `latent_channels` maps, each level but the last halving them."""
    widths = cfg.block_out_channels
    layers = {"conv_in": conv3(widths[0], dtype)}
    for i, width in enumerate(widths):
        count = cfg.layers_per_block
        attentions = count * (cfg.down_block_types[i] == DOWN[1])
        level = blocks(cfg, dtype, width, count, attentions)
        if i < len(widths) - 1:
            # Padded on the lower and right side only.
            half = conv3(width, dtype, 2, ((0, 1), (0, 1)))
            level["downsamplers_0"] = partial(Chain, {"conv": half})
        layers[f"down_blocks_{i}"] = partial(Chain, level)
    layers["mid_block"] = mid_block(cfg, dtype)
    return Chain(layers | outputs(cfg, dtype, 2 * cfg.latent_channels))


def decoder(cfg: VAEConfig, dtype: Any) -> Chain:
    """Latents to images; one resnet more on each level than in the encoder."""
    widths = cfg.block_out_channels[::-1]
    layers = {"conv_in": conv3(widths[0], dtype), "mid_block": mid_block(cfg, dtype)}
    for i, width in enumerate(widths):
        count = cfg.layers_per_block + 1
        attentions = count * (cfg.up_block_types[i] == UP[1])
        level = blocks(cfg, dtype, width, count, attentions)
        if i < len(widths) - 1:
            level["upsamplers_0"] = partial(Upsample, dtype)
        layers[f"up_blocks_{i}"] = partial(Chain, level)
    return Chain(layers | outputs(cfg, dtype, cfg.out_channels))


class AutoencoderKL(nn.Module):
    """Variational autoencoder between images in [-1, 1] and latents, NHWC.

    Convolutions and attention run in `dtype`; parameters, group norms, softmax and all
    results are float32. With height = width = R, latents are R / config.downsample.
    Call a method by `vae.apply({"params": params}, x, method="encode")`.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        conv1 = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        self.encoder = encoder(cfg, self.dtype)
        self.decoder = decoder(cfg, self.dtype)
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
        """Posterior mean, then log variance before clipping, along the last axis.

        images: in [-1, 1]. Returns float32, unscaled.
        """
        out = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            out = self.quant_conv(out)
        return out.astype(jnp.float32)

    def encode(
        self, images: Float[Array, "b height width c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and standard deviation of the posterior q(z | image).

        images: in [-1, 1]. Returns float32, unscaled; the log variance is clipped to
        [-30, 20] as diffusers does.
        """
        mean, logvar = jnp.split(self.moments(images), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(
        self, latents: Float[Array, "b h w z"]
    ) -> Float[Array, "b height width c"]:
        """Images of unscaled latents: z = scaled / scaling_factor + shift_factor.

        Returns float32, about [-1, 1], not clipped.
        """
        h = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            h = self.post_quant_conv(h)
        return self.decoder(h).astype(jnp.float32)

    def __call__(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b height width d"]:
        """Reconstruction from the posterior mean; reaches every parameter for init."""
        return self.decode(self.encode(images)[0])
