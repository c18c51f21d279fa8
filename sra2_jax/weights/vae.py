"""Published autoencoder weights: in the folder format of diffusers, and under the names
of `AutoencoderKL` of CompVis/latent-diffusion, which LightningDiT ships for VA-VAE.
The latter become those of diffusers, by rule; the shape follows from the tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from sra2_jax.errors import UserError, explained
from sra2_jax.models.vae import DOWN, UP, AutoencoderKL, VAEConfig
from sra2_jax.weights import tree
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
describe_vae = FORMAT.describe
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


# Latent-diffusion's

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# in order; what is left keeps its name
RULES = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
FOREIGN = "no autoencoder of the latent-diffusion code"


def from_ldm(
    tensors: Mapping[str, np.ndarray], **numbers: object
) -> tuple[AutoencoderKL, tree.Params]:
    """The network and parameters of a state dict, without its losses, discriminators.
    numbers: fields of `VAEConfig` that no shape shows.

    Raises UserError: tensors that are missing, foreign or of shapes that do not fit.
    """
    own = {k: v for k, v in tensors.items() if k.startswith(PARTS)}
    levels = len(_found(r"encoder\.down\.(\d+)\.", own))

    def from_latent(match: re.Match[str]) -> str:
        """Theirs count from the image, diffusers' from the latent."""
        return f"decoder.up.{levels - 1 - int(match[1])}"

    renamed = {}
    for name, tensor in own.items():
        name = re.sub(r"^decoder\.up\.(\d+)", from_latent, name)
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        matrix = ".attentions." in name and tensor.ndim == 4
        renamed[name] = tensor[:, :, 0, 0] if matrix else tensor
    with explained(FOREIGN, kinds=KeyError):  # a tensor that is missing
        config = _config(renamed, levels, numbers)
    network = AutoencoderKL(config)
    return network, tree.read(renamed, network.shapes(), FORMAT.name, FOREIGN)


def convert_ldm(
    file: Path, out: str, statistics: Path | None = None, scaling_factor: float = 1.0
) -> None:
    """Write the autoencoder in `file` as a folder that `load_vae` and diffusers read.

    Raises UserError: `out` exists, or a file that is none of these.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already: remove it or use another")
    tensors = next(iter(read_file(file).sets.values()))
    try:
        network, params = from_ldm(tensors, scaling_factor=scaling_factor)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    c = read_statistics(statistics, network.config) if statistics else network.config
    FORMAT.save(out, c, params)
    print(
        f"{out}: latents of {c.latent_channels} channels, 1/{c.downsample} of the side"
    )


def _config(
    tensors: Mapping[str, np.ndarray], levels: int, numbers: Mapping[str, object]
) -> VAEConfig:
    def out(name: str) -> int:
        return len(tensors[f"{name}.weight"])

    def kinds(names: tuple[str, str], where: str) -> tuple[str, ...]:
        found = _found(rf"{where}\.(\d+)\.attentions", tensors)
        return tuple(names[str(i) in found] for i in range(levels))

    first = "encoder.down_blocks.0.resnets"
    latent = tensors["decoder.conv_in.weight"].shape[1]
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=out("decoder.conv_out"),
        latent_channels=latent,
        block_out_channels=tuple(
            out(f"encoder.down_blocks.{i}.resnets.0.conv1") for i in range(levels)
        ),
        layers_per_block=len(_found(rf"{first}\.(\d+)\.", tensors)),
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in tensors,
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
        down_block_types=kinds(DOWN, "encoder.down_blocks"),
        up_block_types=kinds(UP, "decoder.up_blocks"),
        **numbers,  # type: ignore[arg-type]
    )


def _found(pattern: str, names: Mapping[str, object]) -> set[str]:
    matches = (re.match(pattern, name) for name in names)
    return {match[1] for match in matches if match}
