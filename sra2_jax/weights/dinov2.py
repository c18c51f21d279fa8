"""Published DINOv2 weights: read and written in the folder format of transformers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_type_hints

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.weights import files
from sra2_jax.weights.files import CONFIG, Params, Shape

WEIGHTS = "model.safetensors"
INDEX = files.index_of(WEIGHTS)
DIGITS = files.ASSETS / "digits_dinov2"
# Keys that change the network and have one value we implement.
ONLY_VALUE = {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "num_channels": 3,
    "use_swiglu_ffn": False,
}
# What transformers assumes where a file was written before the key existed.
NEWER_KEYS = {"use_mask_token": True}
# Our modules -> theirs; those of a block come after encoder.layer.N.
OUTER = {
    "patch": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "positions": "embeddings.position_embeddings",
    "norm": "layernorm",
}
BLOCK = {
    "norm1": "norm1",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "attention_out": "attention.output.dense",
    "scale1": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "scale2": "layer_scale2.lambda1",
}
Keys = tuple[str, ...]
# An image classifier's file: the encoder's names with a prefix, and the classifier.
PREFIX, CLASSIFIER = "dinov2.", ("classifier.weight", "classifier.bias")


def load_dinov2(source: str) -> tuple[DINOv2, Params]:
    """Read a DINOv2 encoder from a folder or from the Hugging Face hub.

    source: a folder as `save_pretrained` of transformers' Dinov2Model (or
    Dinov2ForImageClassification, whose classifier is left out) or `save_dinov2` writes
    it, or a hub id, such as facebook/dinov2-base, optionally with @revision; an
    existing folder wins. "digits" is the small one shipped with this package.

    Returns the module (float32 compute, positions resized as REPA does; `clone` it for
    others) and its parameters: nested dict of float32 numpy arrays, the value of
    "params" in `module.apply`. Put them on the device once with `jax.device_put`.

    Raises:
        UserError: no such folder or file, hub not reachable, a malformed file, another
            kind of model, or tensors that do not fit the config.
    """
    folder = files.fetch(str(DIGITS) if source == "digits" else source, WEIGHTS)
    config = _read_config(folder / CONFIG)
    tensors, weights = files.read_weights(folder, WEIGHTS)
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
            if name not in CLASSIFIER
        }
    module = DINOv2(config)
    # Broadcast zeros: shapes without memory.
    shapes = {
        path: np.broadcast_to(np.float32(0), shape)
        for path, shape in _parameter_shapes(module).items()
    }
    wanted = {name: leaf.shape for name, leaf in _to_torch(shapes, config)}
    files.check_tensors(tensors, wanted, weights)
    flat = {path: _from_torch(tensors, path, config) for path in shapes}
    return module, traverse_util.unflatten_dict(flat)


def describe_dinov2(source: str) -> DINOv2:
    """The network of `load_dinov2` without its weights; of DINOv2-B without a file."""
    if source == "facebook/dinov2-base":
        return DINOv2(DINOv2Config())
    folder = files.fetch(str(DIGITS) if source == "digits" else source, WEIGHTS)
    return DINOv2(_read_config(folder / CONFIG))


def save_dinov2(folder: str | Path, config: DINOv2Config, params: Params) -> None:
    """Write an encoder as transformers 5 does, for `load_dinov2` and for transformers.

    folder: made where missing; files of the same name are replaced. params: as
    `load_dinov2` returns them; each tensor is stored in its own dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params)
    tensors = {
        name: np.ascontiguousarray(leaf) for name, leaf in _to_torch(flat, config)
    }
    depth = config.num_hidden_layers
    fields = {
        "apply_layernorm": True,
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "dtype": str(tensors["layernorm.weight"].dtype),
        "hidden_act": ONLY_VALUE["hidden_act"],
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "initializer_range": 0.02,
        "layer_norm_eps": config.layer_norm_eps,
        "layerscale_value": 1.0,
        "mlp_ratio": config.mlp_ratio,
        "model_type": ONLY_VALUE["model_type"],
        "num_attention_heads": config.num_attention_heads,
        "num_channels": ONLY_VALUE["num_channels"],
        "num_hidden_layers": depth,
        "out_features": [f"stage{depth}"],
        "out_indices": [depth],
        "patch_size": config.patch_size,
        "qkv_bias": config.qkv_bias,
        "reshape_hidden_states": True,
        "stage_names": ["stem", *(f"stage{i + 1}" for i in range(depth))],
        "transformers_version": "5.23.0",
        "use_mask_token": config.use_mask_token,
        "use_swiglu_ffn": ONLY_VALUE["use_swiglu_ffn"],
    }
    # A stale index would win over the new file.
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, fields)


def _read_config(path: Path) -> DINOv2Config:
    """DINOv2Config of a config.json; a model with other mathematics is refused."""
    fields = files.read_json(path)
    if "model_type" not in fields:
        raise UserError(f"{path}: model_type is missing; give the folder of a DINOv2")
    files.check_values(path, fields, ONLY_VALUE, "choose another encoder")
    fields = NEWER_KEYS | fields
    kinds = get_type_hints(DINOv2Config)
    values = {key: files.field(path, fields, key, kind) for key, kind in kinds.items()}
    try:
        return DINOv2Config(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parameter_shapes(module: DINOv2) -> dict[Keys, Shape]:
    """Shape of every parameter by its path, without allocating one."""
    side = module.config.patch_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), pixels)
    flat = traverse_util.flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in flat.items()}


def _torch_names(path: Keys, config: DINOv2Config) -> list[str]:
    """Names of a parameter in a file: one, or one for each block of a stacked one."""
    stacked = path[0] == "blocks"
    module, *leaf = path[1:] if stacked else path
    name = (BLOCK if stacked else OUTER)[module]
    if leaf:
        name += ".bias" if leaf == ["bias"] else ".weight"
    if not stacked:
        return [name]
    return [f"encoder.layer.{i}.{name}" for i in range(config.num_hidden_layers)]


def _to_torch(
    flat: Mapping[Keys, np.ndarray], config: DINOv2Config
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of a file: blocks apart, matrices (out, in)."""
    p = config.patch_size
    for path, leaf in flat.items():
        parts = leaf if path[0] == "blocks" else [leaf]
        for name, part in zip(_torch_names(path, config), parts, strict=True):
            part = np.asarray(part)
            if path == ("patch", "kernel"):
                part = part.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
            elif path[-1] == "kernel":
                part = part.T
            yield name, part


def _from_torch(
    tensors: Mapping[str, np.ndarray], path: Keys, config: DINOv2Config
) -> np.ndarray:
    """The parameter at `path`, the inverse of `_to_torch`."""
    parts = [tensors[name] for name in _torch_names(path, config)]
    if path == ("patch", "kernel"):
        parts = [part.transpose(2, 3, 1, 0).reshape(-1, len(part)) for part in parts]
    elif path[-1] == "kernel":
        parts = [part.T for part in parts]
    return np.stack(parts) if path[0] == "blocks" else np.ascontiguousarray(parts[0])
