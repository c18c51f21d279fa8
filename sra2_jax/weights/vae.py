"""Published autoencoder weights, in the folder format of diffusers."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from sra2_jax.errors import UserError
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.weights.files import Format, read_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Attention names of early diffusers, still in the file of sd-vae-ft-ema.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Keys that change the network and have one value we implement.
ONLY_VALUE = {"_class_name": "AutoencoderKL", "act_fn": "silu"}


def _name(module: str) -> str:
    """ "encoder.down_blocks_0.conv" -> "encoder.down_blocks.0.conv"."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", module)


def _current_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Old attention names made current, and their 1x1 convolutions made matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for old, new in OLD.items():
                name = name.replace(f".{old}.", f".{new}.")
            if tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


FORMAT = Format(WEIGHTS, AutoencoderKL, VAEConfig, ONLY_VALUE, _name, _current_names)
load_vae = FORMAT.load


def read_statistics(file: Path, config: VAEConfig) -> VAEConfig:
    """The config with the `latents_mean` and `latents_std` of a file.

    file: as of `files.read_file`, with "mean" and "std" of each channel (LightningDiT's
    latents_stats.pt), or "latents_bias" and "latents_scale", 1 / std (REPA-E's files).

    Raises UserError: others, or not a number for each channel.
    """
    found = next(iter(read_file(file).sets.values()))
    if found.keys() == {"latents_bias", "latents_scale"}:
        found = {"mean": found["latents_bias"], "std": 1 / found["latents_scale"]}
    sizes, count = {name: x.size for name, x in found.items()}, config.latent_channels
    if sizes != {"mean": count, "std": count}:
        raise UserError(
            f"{file}: mean and std of {count} channels are wanted, it has {sizes!s:.80}"
        )
    mean, std = (tuple(map(float, found[name].ravel())) for name in ("mean", "std"))
    return replace(config, latents_mean=mean, latents_std=std)
