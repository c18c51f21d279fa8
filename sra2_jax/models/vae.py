"""The image autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

`AutoencoderKL` of diffusers 0.42 (the network of sd-vae-ft-ema and -mse, SDXL, SD3 and
FLUX) with NHWC arrays. Module names are diffusers' names with `.N` written `_N`, so
that `sra2_jax.weights` converts weights by rule instead of by table.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sra2_jax.errors import UserError

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers DiagonalGaussianDistribution


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the defaults are those of sd-vae-ft-ema.

    A latent z goes to the diffusion model as (z - shift_factor) * scaling_factor; the
    network itself never applies the two numbers, they only travel with it.

    Raises:
        UserError: a count is not positive, or norm_num_groups does not divide one of
            block_out_channels.
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

    def __post_init__(self) -> None:
        counts = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "the number of block_out_channels": len(self.block_out_channels),
        }
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"VAE config: {name} is {count}; give a number above 0")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise UserError(
                    f"VAE config: norm_num_groups {self.norm_num_groups} does not "
                    f"divide {width} of block_out_channels; change one of them"
                )
        if self.scaling_factor == 0.0:
            raise UserError("VAE config: scaling_factor is 0; give 1 / std of latents")

    @property
    def downsample(self) -> int:
        """Pixels per latent position and axis: 8 for sd-vae-ft-ema."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.Module):
    """Group normalisation with statistics in float32, result in `dtype`."""

    groups: int
    dtype: Any

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
        return (normed * scale + bias).astype(self.dtype)


def _conv3(features: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a skip, projected where the width changes."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        h = _conv3(self.features, self.dtype, "conv1")(h)
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(h))
        h = _conv3(self.features, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(
                x
            )
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions with a single head as wide as the features."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, self.dtype, name="group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (
            nn.Dense(channels, dtype=self.dtype, name=name)(h)
            for name in ("to_q", "to_k", "to_v")
        )
        scores = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(channels)).astype(self.dtype)
        h = jnp.einsum("bts,bsc->btc", weights, v)
        h = nn.Dense(channels, dtype=self.dtype, name="to_out_0")(h)
        return x + h.reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention (optional), resnet at the lowest resolution."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        width, groups = x.shape[-1], self.config.norm_num_groups
        x = ResnetBlock(width, groups, self.dtype, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(width, groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Convolution with stride 2, padded on the lower and right side only."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=(2, 2),
            padding=((0, 1), (0, 1)),
            dtype=self.dtype,
            name="conv",
        )(x)


class Upsample(nn.Module):
    """Each pixel doubled along both axes, then a convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return _conv3(x.shape[-1], self.dtype, "conv")(x)


class Stage(nn.Module):
    """The resnets of one resolution, then a change of resolution unless it is the last.

    `resample` is "down", "up" or None.
    """

    features: int
    layers: int
    groups: int
    resample: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        for i in range(self.layers):
            x = ResnetBlock(
                self.features, self.groups, self.dtype, name=f"resnets_{i}"
            )(x)
        if self.resample == "down":
            x = Downsample(self.dtype, name="downsamplers_0")(x)
        elif self.resample == "up":
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Images to twice `latent_channels` maps, each stage but the last halving them."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        cfg = self.config
        widths = cfg.block_out_channels
        x = _conv3(widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            x = Stage(
                width,
                cfg.layers_per_block,
                cfg.norm_num_groups,
                "down" if i < len(widths) - 1 else None,
                self.dtype,
                name=f"down_blocks_{i}",
            )(x)
        x = MidBlock(cfg, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, self.dtype, name="conv_norm_out")(x))
        return _conv3(2 * cfg.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to images; one resnet more per stage than in the encoder."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        cfg = self.config
        widths = cfg.block_out_channels[::-1]
        x = _conv3(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(cfg, self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            x = Stage(
                width,
                cfg.layers_per_block + 1,
                cfg.norm_num_groups,
                "up" if i < len(widths) - 1 else None,
                self.dtype,
                name=f"up_blocks_{i}",
            )(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, self.dtype, name="conv_norm_out")(x))
        return _conv3(cfg.out_channels, self.dtype, "conv_out")(x)


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
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        if cfg.use_quant_conv:
            self.quant_conv = nn.Conv(2 * cfg.latent_channels, (1, 1), dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(
                cfg.latent_channels, (1, 1), dtype=self.dtype
            )

    def moments(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b h w moments"]:
        """Posterior mean, then log variance before clipping, along the last axis.

        images: (B, H, W, in_channels) in [-1, 1]. Returns float32
        (B, H/downsample, W/downsample, 2 * latent_channels), unscaled.
        """
        out = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            out = self.quant_conv(out)
        return out.astype(jnp.float32)

    def encode(
        self, images: Float[Array, "b height width c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and standard deviation of the posterior q(z | image).

        images: (B, H, W, in_channels) in [-1, 1]. Returns two float32 arrays
        (B, H/downsample, W/downsample, latent_channels), unscaled; the log variance is
        clipped to [-30, 20] as diffusers does.
        """
        mean, logvar = jnp.split(self.moments(images), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(
        self, latents: Float[Array, "b h w z"]
    ) -> Float[Array, "b height width c"]:
        """Images of unscaled latents: z = scaled / scaling_factor + shift_factor.

        latents: (B, h, w, latent_channels). Returns float32
        (B, h * downsample, w * downsample, out_channels), about [-1, 1], not clipped.
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
