"""Files of weights: folders of the hub, and state dicts; names to arrays.

A folder holds config.json and one safetensors file, or, sharded, that file's name with
.index.json and the files it lists. A state dict is a .safetensors, a .npz or one of
PyTorch's. No code that a file brings is run.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from sra2_jax.config_file import HUB_ID
from sra2_jax.errors import UserError

CONFIG = "config.json"
INDEX = ".index.json"  # added to the name of a sharded file
ASSETS = Path(__file__).parents[1] / "assets"
MISFIT = f"weights of another network than that of {CONFIG}"
LARGEST = 2**16  # number in a config: a larger one is a mistake, or an attack
# the reference's names of its sets of weights -> ours
SETS = {"model": "raw", "ema": "ema"}
# what else its files hold
BESIDES = ("opt", "args", "epoch", "steps")
WRITTEN = (".safetensors", ".npz")
REVERSED = "noise to data"  # note of a network that runs so

Config = TypeVar("Config")


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
    hub_id = HUB_ID.fullmatch(source)
    wanted = f"give a folder with {CONFIG} and {weights}"
    if folder.exists() or hub_id is None:
        raise UserError(
            f"{source}: no such folder, and not a hub id either; {wanted}, or "
            "owner/name[@revision]"
        )
    # Imported here: it takes a second, and local folders do not need it.
    from huggingface_hub import snapshot_download

    shards = weights.replace(".safetensors", "-*.safetensors")
    try:
        return Path(
            snapshot_download(
                hub_id["repo"],
                revision=hub_id["revision"],
                allow_patterns=[CONFIG, weights, weights + INDEX, shards],
            )
        )
    # The client lets errors of several libraries through; the way out is the same.
    except Exception as error:
        raise UserError(
            f"{source}: no such local folder, and the hub did not deliver it "
            f"({first_line(error)}); check the name, the network and HF_HUB_OFFLINE, "
            f"or {wanted}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Raises:
        UserError: no such file, not JSON, not an object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder of save_pretrained")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON object ({error}); fetch it again") from error
    return content


def read_config(
    folder: Path,
    kind: type[Config],
    newer: Mapping[str, Any],
    only: Mapping[str, Any],
) -> tuple[Config, dict[str, Any]]:
    """A folder's config.json as the dataclass `kind`, and all of its fields.

    newer: what stands for a key that is missing or null; only: see `check_values`.

    Raises:
        UserError: a field that is missing, of another type, an absurd number, or one
            that `kind` refuses; otherwise as `read_json` and `check_values`.
    """
    found = read_json(folder / CONFIG)
    fields = {**newer, **{k: v for k, v in found.items() if v is not None}}
    check_values(folder, fields, only)
    values = {}
    for key, of in get_type_hints(kind).items():
        value = fields.get(key)
        if not _is(value, of):
            raise UserError(
                f"{folder / CONFIG}: {key} is {value!r:.80}; "
                f"{getattr(of, '__name__', of)} expected, at most {LARGEST}"
            )
        values[key] = (get_origin(of) or of)(value)
    try:
        return kind(**values), fields
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def check_values(
    folder: Path, fields: Mapping[str, Any], only: Mapping[str, Any]
) -> None:
    """Refuse a key of `only` that is there with another value."""
    for key, value in only.items():
        if fields.get(key, value) != value:
            raise UserError(
                f"{folder / CONFIG}: {key} is {fields[key]!r:.80}; only {value!r} is "
                "supported, choose another model"
            )


def _is(value: Any, kind: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(_is(part, int) for part in value)
    kinds = (int, float) if kind is float else (kind,)
    return type(value) in kinds and abs(value) <= LARGEST  # false for NaN


def read_weights(folder: Path, weights: str) -> dict[str, np.ndarray]:
    """All tensors of a folder by their name."""
    index = folder / (weights + INDEX)
    if not index.is_file():
        return _read(folder / weights)
    shards = read_json(index).get("weight_map")
    names = {str(name) for name in shards.values()} if type(shards) is dict else {""}
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: its weight_map has {name!r:.80}, not the plain name of a "
                ".safetensors file; fetch it again"
            )
        tensors |= _read(folder / name)
    return tensors


def write_folder(
    folder: Path,
    weights: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Write config.json and weights as `save_pretrained` of the libraries does."""
    folder.mkdir(parents=True, exist_ok=True)
    # A stale index would win over the new file, here and in the libraries.
    (folder / (weights + INDEX)).unlink(missing_ok=True)
    save_file(dict(tensors), folder / weights, metadata={"format": "pt"})
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
      sets: "raw" and "ema", either, or "unnamed" where the file does not say which;
        reference names -> arrays.
      step: training steps done; heads: of the attention. None where it does not say.
      reverse: it says that its time runs from noise to data.
    """

    sets: dict[str, dict[str, np.ndarray]]
    step: int | None
    heads: int | None
    reverse: bool


def read_file(path: Path) -> Contents:
    """Read a checkpoint of the reference code, or one that `write_file` wrote.

    A state dict, or a dict with model, ema or both (in flat files name prefixes,
    "ema." or "ema/"), perhaps below state_dict. The dtypes are the file's own, but
    PyTorch's of 32 bits or less come as float32.

    Raises:
      UserError: no such file, another kind, damaged, or a pickle that asks for code.
    """
    tree = _read(path)
    notes: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
    tree = {re.sub(r"^(state_dict\.)+", "", name): v for name, v in tree.items()}
    sets = {}
    for key, ours in SETS.items():
        prefixes = f"{key}.", f"{key}/"
        part = {k[len(key) + 1 :]: v for k, v in tree.items() if k.startswith(prefixes)}
        if part:
            sets[ours] = part
    if not sets:
        one = {k: v for k, v in tree.items() if k.split(".")[0] not in BESIDES}
        sets["unnamed"] = one
    for name, value in ((n, v) for part in sets.values() for n, v in part.items()):
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"{path}: {name} is a {type(value).__name__}, not a tensor: give a "
                "state dict, or a dict with model or ema"
            )
    step = _integer(tree.get("steps", notes.get("step")))
    heads = _integer(notes.get("num_heads"))
    return Contents(sets, step, heads, notes.get("time") == REVERSED)


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any]:
    """The names of a file and what they hold: arrays, or of PyTorch plain values.

    Raises:
      UserError: as `read_file`.
    """
    readers: dict[str, Callable[[Path], dict[str, Any]]]
    readers = {".npz": _read_npz, ".safetensors": load_file}
    readers |= dict.fromkeys((".pt", ".pth", ".ckpt"), _read_torch)
    if path.suffix not in readers or not path.is_file():
        raise UserError(f"{path}: no such file, or not one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except ImportError as error:
        raise UserError(
            f"{path}: needs PyTorch: pip install -e '.[torch]', or save the state dict "
            "as .safetensors elsewhere"
        ) from error
    except Exception as error:  # numpy, zipfile, safetensors and torch raise many kinds
        raise UserError(
            f"{path}: truncated, or not a state dict of plain tensors "
            f"({first_line(error)}): fetch it again"
        ) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Opened here: np.load leaves a file that is no archive open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def _read_torch(path: Path) -> dict[str, Any]:
    """What torch.save wrote, with arrays for tensors, without optimizer state.

    Nothing but tensors, plain values and the reference's argparse.Namespace is made.
    """
    import torch

    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with allowed, warnings.catch_warnings(action="ignore"):
        tree = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),  # older files are pickles throughout
        )
    return dict(_flat(tree))


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names joined by dots, with arrays for tensors.

    Floats of 32 bits or less come as float32, which changes none.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key == "opt":
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif not hasattr(value, "detach"):
            yield name, value
        elif value.is_floating_point() and value.itemsize <= 4:
            yield name, value.detach().float().numpy()
        else:
            yield name, value.detach().numpy()


def first_line(error: BaseException) -> str:
    """The error's kind and what it says, in one line."""
    # Torch's comes after advice to load the file without any protection.
    told = str(error).split("WeightsUnpickler error:")[-1].split()
    return f"{type(error).__name__}: {' '.join(told)[:200]}"


def write_file(
    path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]
) -> None:
    """Write a state dict whole or not at all; an .npz has no place for the notes.

    Raises:
      UserError: another suffix, no such folder, a file there already, a full disk.
    """
    check_writable(path)
    part, arrays = path.with_name(f"{path.name}.part"), dict[str, Any](tensors)
    try:
        if path.suffix == ".npz":
            with part.open("wb") as file:
                np.savez(file, **arrays)
        else:
            save_file(arrays, part, dict(notes))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that `write_file` would."""
    if path.suffix not in WRITTEN:
        raise UserError(f"{path}: must end in {' or '.join(WRITTEN)}")
    if path.exists():
        raise UserError(f"{path}: exists already: name another file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no such folder: make it first")
