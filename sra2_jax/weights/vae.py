"""Published autoencoder weights: read and written in the folder format of diffusers."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from sra2_jax.errors import UserError
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.section import shown
from sra2_jax.weights import files
from sra2_jax.weights.files import CONFIG, Params, Shape

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = files.index_of(WEIGHTS)
DIGITS = files.ASSETS / "digits_vae"
# Attention names of early diffusers, still in the file of sd-vae-ft-ema.
OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
# Keys that change the network or its latents and have one value we implement.
ONLY_VALUE = {
    "act_fn": "silu",
    "double_z": True,
    "latents_mean": None,
    "latents_std": None,
}
# What diffusers assumes where a file was written before the key existed.
NEWER_KEYS = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
MOST_LAYERS = 16  # of a level; each takes time before it is held against the weights
BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}


def load_vae(source: str) -> tuple[AutoencoderKL, Params]:
    """Read an AutoencoderKL from a folder or from the Hugging Face hub.

    source: a folder as `save_pretrained` of diffusers or `save_vae` writes it, or a hub
    id `owner/name`, optionally `owner/name@revision`; an existing folder wins. "digits"
    is the small one shipped with this package.

    Returns the module (float32 compute; `vae.clone(dtype=jnp.bfloat16)` for less) and
    its parameters: nested dict of float32 numpy arrays, the value of "params" in
    `vae.apply`. Put them on the device once with `jax.device_put`.

    Raises:
        UserError: no such folder or file, hub not reachable, a malformed file, another
            kind of model, or tensors that do not fit the config.
    """
    folder = files.fetch(str(DIGITS) if source == "digits" else source, WEIGHTS)
    config = _read_config(folder / CONFIG)
    tensors, weights = files.read_weights(folder, WEIGHTS)
    model = AutoencoderKL(config)
    return model, _to_params(tensors, _expected_shapes(model), weights)


def save_vae(folder: str | Path, config: VAEConfig, params: Params) -> None:
    """Write an AutoencoderKL as diffusers 0.42 does, for `load_vae` and for diffusers.

    folder: made where missing; files of the same name are replaced. params: as
    `load_vae` returns them; each tensor is stored in its own dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    levels = len(config.block_out_channels)
    fields = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [BLOCKS["down_block_types"]] * levels,
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        # Read by diffusers' tiled decoding only.
        "sample_size": 32 * config.downsample,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "up_block_types": [BLOCKS["up_block_types"]] * levels,
        "use_post_quant_conv": config.use_post_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }
    tensors = {
        _torch_name(path): np.ascontiguousarray(_torch_layout(np.asarray(leaf)))
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    # A stale index would win over the new file, here and in diffusers.
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, fields)


def _read_config(path: Path) -> VAEConfig:
    """VAEConfig of a config.json; keys newer than a file have diffusers' defaults."""
    fields = files.read_json(path)
    _check_supported(path, fields)
    fields = NEWER_KEYS | fields
    if fields["shift_factor"] is None:
        fields["shift_factor"] = 0.0
    kinds = get_type_hints(VAEConfig)
    widths = fields["block_out_channels"]
    if not all(type(width) is int and width <= files.LARGEST for width in widths):
        raise UserError(
            f"{path}: block_out_channels is {shown(widths)}; channels expected"
        )
    if files.field(path, fields, "layers_per_block", int) > MOST_LAYERS:
        raise UserError(
            f"{path}: layers_per_block is {fields['layers_per_block']}; at most "
            f"{MOST_LAYERS} expected"
        )
    values = {
        key: files.field(path, fields, key, kind)
        for key, kind in kinds.items()
        if key != "block_out_channels"
    }
    try:
        return VAEConfig(block_out_channels=tuple(widths), **values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_supported(path: Path, fields: dict[str, Any]) -> None:
    """Refuse another kind of model and settings that AutoencoderKL here lacks."""
    name = fields.get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(
            f"{path}: _class_name is {shown(name)}; only AutoencoderKL can be loaded "
            "(in a pipeline's folder it is the subfolder vae)"
        )
    files.check_values(path, fields, ONLY_VALUE, "choose another VAE")
    levels = files.field(path, fields, "block_out_channels", list)
    for key, block in BLOCKS.items():
        if key in fields and fields[key] != [block] * len(levels):
            raise UserError(
                f"{path}: {key} is {shown(fields[key])}; only {block}, once for each "
                f"of block_out_channels {shown(levels)}, is supported, choose another "
                "VAE"
            )


def _expected_shapes(model: AutoencoderKL) -> dict[tuple[str, ...], Shape]:
    """Shape of every parameter by its path, without allocating one."""
    side = model.config.downsample
    image = jax.ShapeDtypeStruct((1, side, side, model.config.in_channels), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flat = traverse_util.flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in flat.items()}


def _torch_name(path: tuple[str, ...]) -> str:
    """("encoder", "down_blocks_0", "kernel") -> "encoder.down_blocks.0.weight"."""
    modules = [re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
    leaf = "bias" if path[-1] == "bias" else "weight"
    return ".".join([*modules, leaf])


def _torch_layout(leaf: np.ndarray) -> np.ndarray:
    """Flax to torch: (h, w, in, out) -> (out, in, h, w), (in, out) -> (out, in)."""
    return leaf.transpose((3, 2, 0, 1)) if leaf.ndim == 4 else leaf.T


def _flax_layout(tensor: np.ndarray) -> np.ndarray:
    """Torch to Flax, the inverse of `_torch_layout`."""
    return tensor.transpose((2, 3, 1, 0)) if tensor.ndim == 4 else tensor.T


def _current_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Old attention names made current, and their 1x1 convolutions made matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        parent, _, layer = head.rpartition(".")
        if ".attentions." in name:
            head = f"{parent}.{OLD_ATTENTION.get(layer, layer)}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[f"{head}.{last}"] = tensor
    return renamed


def _to_params(
    tensors: dict[str, np.ndarray],
    expected: dict[tuple[str, ...], Shape],
    source: Path,
) -> Params:
    """Flax tree of torch tensors; every name and shape must fit."""
    tensors = _current_names(tensors)
    wanted = {
        _torch_name(path): _torch_layout(np.broadcast_to(np.float32(0), shape)).shape
        for path, shape in expected.items()
    }
    files.check_tensors(tensors, wanted, source)
    flat = {
        path: np.ascontiguousarray(_flax_layout(tensors[_torch_name(path)]))
        for path in expected
    }
    return traverse_util.unflatten_dict(flat)
