"""What the loaders share: a folder or hub id, JSON, safetensors, names and shapes.

A folder holds config.json and one safetensors file, or, sharded, that file's name with
.index.json and the files it lists. Only JSON and safetensors are ever opened; pickled
.bin or .ckpt files are not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sra2_jax.config_file import HUB_ID
from sra2_jax.errors import UserError
from sra2_jax.section import shown

CONFIG = "config.json"
ASSETS = Path(__file__).parents[1] / "assets"

LARGEST = 2**16  # number in a config: a larger one is a mistake, or an attack

Params = dict[str, Any]
Shape = tuple[int, ...]


def index_of(weights: str) -> str:
    """Name of the index of a sharded `weights` file."""
    return weights + ".index.json"


def fetch(source: str, weights: str) -> Path:
    """The local folder of `source`, downloaded if it is a hub id.

    source: a folder or `owner/name[@revision]`; an existing folder wins. A commit as
    revision pins what is loaded. With HF_HUB_OFFLINE=1 nothing is downloaded, and what
    was downloaded before is used. weights: name of the safetensors file in it.

    Raises:
        UserError: neither a folder nor a hub id, or the hub does not deliver it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source}: is a file; give the folder that holds {CONFIG}")
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None:
        raise UserError(
            f"{source}: no such folder, and not a hub id either; give a folder with "
            f"{CONFIG} and {weights}, or owner/name[@revision]"
        )
    # Imported here: it takes a second, and local folders do not need it.
    from huggingface_hub import constants, snapshot_download

    shards = weights.replace(".safetensors", "-*.safetensors")
    try:
        return Path(
            snapshot_download(
                hub_id["repo"],
                revision=hub_id["revision"],
                allow_patterns=[CONFIG, weights, index_of(weights), shards],
            )
        )
    # The client lets errors of several libraries through; the way out is the same.
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{source}: not downloaded before, and HF_HUB_OFFLINE forbids it now: "
                "unset it, or give a folder"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: no such local folder, and the hub did not deliver it "
            f"({type(error).__name__}: {reason}); check the name and the network, or "
            f"download {CONFIG} and {weights} into a folder and give its path"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, not JSON, not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a folder that holds {CONFIG} and weights in "
            "safetensors, as save_pretrained writes them"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable JSON ({error}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return content


def field(path: Path, fields: Mapping[str, Any], key: str, kind: type) -> Any:
    """fields[key], refused unless it is of `kind` (an int is made a float) and no
    absurd number."""
    if key not in fields:
        raise UserError(f"{path}: {key} is missing; fetch the file again")
    value = fields[key]
    if type(value) in (int, float) and not abs(value) <= LARGEST:  # also NaN
        raise UserError(f"{path}: {key} is {shown(value)}; at most {LARGEST} expected")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: {key} is {shown(value)}; {kind.__name__} expected")
    return value


def check_values(
    path: Path, fields: Mapping[str, Any], only: Mapping[str, Any], way_out: str
) -> None:
    """Refuse a key of `only` that is there with another value; `way_out` ends the
    message."""
    for key, value in only.items():
        if fields.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {shown(fields[key])}; only {value!r} is supported, "
                f"{way_out}"
            )


def read_weights(folder: Path, weights: str) -> tuple[dict[str, np.ndarray], Path]:
    """All tensors as float32 by their name, and the file to name in messages."""
    index = folder / index_of(weights)
    if not index.is_file():
        return _as_float32(read_safetensors(folder / weights)), folder / weights
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; fetch it again")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted({str(shard) for shard in weight_map.values()}):
        if Path(name).name != name:
            raise UserError(
                f"{index}: {name!r} is not a plain file name; fetch it again"
            )
        tensors |= _as_float32(read_safetensors(folder / name))
    return tensors, index


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one file, each in its own dtype (bfloat16 is that of ml_dtypes).

    Raises:
        UserError: no such file, or not whole safetensors.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; weights must be safetensors, save them anew with "
            "save_pretrained(folder, safe_serialization=True) if there are others"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # AttributeError: a dtype that numpy lacks
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: truncated or malformed safetensors ({error}); fetch it again"
        ) from error


def _as_float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def check_tensors(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], source: Path
) -> None:
    """Refuse tensors whose names and shapes are not exactly the expected ones.

    Raises:
        UserError: a tensor is missing, foreign or of another shape; the message names
            `source` and the first of them.
    """
    missing = sorted(set(expected) - set(tensors))
    surplus = sorted(set(tensors) - set(expected))
    for kind, found in (("missing", missing), ("unexpected", surplus)):
        if found:
            raise UserError(
                f"{source}: {len(found)} tensors {kind}, first {found[0]}; does "
                f"{CONFIG} beside it belong to these weights?"
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{source}: {name} has shape {tensors[name].shape}, "
                f"{CONFIG} asks for {shape}; do the two files belong together?"
            )


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a config as the libraries do: two spaces, a newline at the end."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
