"""Published autoencoder weights: read and written in the folder format of diffusers.

A folder holds config.json and diffusion_pytorch_model.safetensors, or, sharded,
diffusion_pytorch_model.safetensors.index.json with the files it names. Only JSON and
safetensors are ever opened; pickled .bin or .ckpt files are not.
"""

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sra2_jax.errors import UserError
from sra2_jax.models.vae import AutoencoderKL, VAEConfig

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
DIGITS = Path(__file__).parent / "assets" / "digits_vae"
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
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
BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}

Params = dict[str, Any]


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
    folder = _fetch(str(DIGITS) if source == "digits" else source)
    config = _read_config(folder / CONFIG)
    tensors, weights = _read_weights(folder)
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
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _fetch(source: str) -> Path:
    """The local folder of `source`, downloaded if it is a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source}: is a file; give the folder that holds {CONFIG}")
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None:
        raise UserError(
            f"{source}: no such folder, and not a hub id either; give a folder with "
            f"{CONFIG} and {WEIGHTS}, or owner/name[@revision]"
        )
    # Imported here: it takes a second, and local folders do not need it.
    from huggingface_hub import snapshot_download

    shards = WEIGHTS.replace(".safetensors", "-*.safetensors")
    try:
        return Path(
            snapshot_download(
                hub_id["repo"],
                revision=hub_id["revision"],
                allow_patterns=[CONFIG, WEIGHTS, INDEX, shards],
            )
        )
    # The client lets errors of several libraries through; the way out is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: no such local folder, and the hub did not deliver it "
            f"({type(error).__name__}: {reason}); check the name and the network, or "
            f"download {CONFIG} and {WEIGHTS} into a folder and give its path"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; a VAE folder holds {CONFIG} and {WEIGHTS}, as "
            "diffusers' save_pretrained writes them"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable JSON ({error}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return content


def _read_config(path: Path) -> VAEConfig:
    """VAEConfig of a config.json; keys newer than a file have diffusers' defaults."""
    fields = _read_json(path)
    _check_supported(path, fields)
    fields = NEWER_KEYS | fields
    if fields["shift_factor"] is None:
        fields["shift_factor"] = 0.0
    kinds = get_type_hints(VAEConfig)
    widths = _field(path, fields, "block_out_channels", list)
    if not all(type(width) is int for width in widths):
        raise UserError(f"{path}: block_out_channels is {widths!r}; integers expected")
    values = {
        key: _field(path, fields, key, kind)
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
            f"{path}: _class_name is {name!r}; only AutoencoderKL can be loaded (in a "
            "pipeline's folder it is the subfolder vae)"
        )
    for key, value in ONLY_VALUE.items():
        if fields.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {fields[key]!r}; only {value!r} is supported, "
                "choose another VAE"
            )
    levels = fields.get("block_out_channels")
    for key, block in BLOCKS.items():
        if key in fields and fields[key] != [block] * len(levels or ()):
            raise UserError(
                f"{path}: {key} is {fields[key]!r}; only {block}, once for each of "
                f"block_out_channels {levels!r}, is supported, choose another VAE"
            )


def _field(path: Path, fields: dict[str, Any], key: str, kind: type) -> Any:
    """fields[key], refused unless it is of `kind` (an int is made a float)."""
    if key not in fields:
        raise UserError(f"{path}: {key} is missing; fetch the file again")
    value = fields[key]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: {key} is {value!r}; {kind.__name__} expected")
    return value


def _read_weights(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """All tensors by their name in the file, and the file to name in messages."""
    index = folder / INDEX
    if not index.is_file():
        return _read_safetensors(folder / WEIGHTS), folder / WEIGHTS
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; fetch it again")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted({str(shard) for shard in weight_map.values()}):
        if Path(name).name != name:
            raise UserError(
                f"{index}: {name!r} is not a plain file name; fetch it again"
            )
        tensors |= _read_safetensors(folder / name)
    return tensors, index


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one file as float32."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; weights must be safetensors, save them anew with "
            "save_pretrained(folder, safe_serialization=True) if there are others"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: _float32(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: truncated or malformed safetensors ({error}); fetch it again"
        ) from error


def _float32(tensor: np.ndarray) -> np.ndarray:
    return np.asarray(tensor, dtype=np.float32)


def _expected_shapes(model: AutoencoderKL) -> dict[tuple[str, ...], tuple[int, ...]]:
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
    expected: dict[tuple[str, ...], tuple[int, ...]],
    source: Path,
) -> Params:
    """Flax tree of torch tensors; every name and shape must fit."""
    tensors = _current_names(tensors)
    names = {path: _torch_name(path) for path in expected}
    missing = sorted(set(names.values()) - set(tensors))
    surplus = sorted(set(tensors) - set(names.values()))
    for kind, found in (("missing", missing), ("unexpected", surplus)):
        if found:
            raise UserError(
                f"{source}: {len(found)} tensors {kind}, first {found[0]}; does "
                f"{CONFIG} beside it belong to these weights?"
            )
    flat = {}
    for path, shape in expected.items():
        leaf = _flax_layout(tensors[names[path]])
        if leaf.shape != shape:
            wanted = _torch_layout(np.broadcast_to(np.float32(0), shape)).shape
            raise UserError(
                f"{source}: {names[path]} has shape {tensors[names[path]].shape}, "
                f"{CONFIG} asks for {wanted}; do the two files belong together?"
            )
        flat[path] = np.ascontiguousarray(leaf)
    return traverse_util.unflatten_dict(flat)
