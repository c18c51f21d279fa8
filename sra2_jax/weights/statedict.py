"""Files of PyTorch-layout state dicts: .pt, .safetensors, .npz; names to arrays."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sra2_jax.errors import UserError
from sra2_jax.weights.files import read_safetensors

# the reference's names of its sets of weights -> ours
SETS = {"model": "raw", "ema": "ema"}
# what else its files hold
BESIDES = ("opt", "args", "epoch", "steps")
WRITTEN = (".safetensors", ".npz")
MOST_RATIO, SMALL = 20, 2**28  # of unpacked to packed bytes; bytes anyone has
REVERSED = "noise to data"  # note of a network that runs so


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
      sets: "raw" and "ema", either, or "one" where the file does not say which it is;
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
    tree = read_tree(path)
    notes: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
    while isinstance(inner := tree.get("state_dict"), Mapping):
        tree = {k: v for k, v in tree.items() if k != "state_dict"} | dict(inner)
    sets = {}
    for key, ours in SETS.items():
        part = tree.get(key)
        if not isinstance(part, Mapping):
            prefixes = f"{key}.", f"{key}/"
            part = {
                k[len(key) + 1 :]: v for k, v in tree.items() if k.startswith(prefixes)
            }
        if part:
            sets[ours] = dict(part)
    sets = sets or {"one": {k: v for k, v in tree.items() if k not in BESIDES}}
    for name, value in ((n, v) for part in sets.values() for n, v in part.items()):
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"{path}: {name} is a {type(value).__name__}, not a tensor: give a "
                "state dict, or a dict with model or ema"
            )
    step = _integer(tree.get("steps", notes.get("step")))
    heads = _integer(notes.get("num_heads"))
    return Contents(sets, step, heads, notes.get("time") == REVERSED)


def read_tree(path: Path) -> Mapping[str, Any]:
    """The names of a file and what they hold: arrays, mappings, plain values.

    Raises:
      UserError: as `read_file`.
    """
    readers = {".npz": _read_npz, ".safetensors": read_safetensors}
    readers |= dict.fromkeys((".pt", ".pth", ".ckpt"), _read_torch)
    if path.suffix not in readers:
        raise UserError(f"{path}: not one of {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tree: Any = readers[path.suffix](path)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    _check_numbers(path, tree)
    return tree


def _check_numbers(path: Path, tree: Mapping[str, Any]) -> None:
    """Refuse arrays of texts, dates, records and the like."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _check_numbers(path, value)
        elif isinstance(value, np.ndarray):
            dtype = value.dtype
            if dtype.kind not in "fiu" and dtype.name != "bfloat16":
                raise UserError(
                    f"{path}: {name[:80]} holds {str(dtype)[:80]}, not real numbers: "
                    "give a state dict"
                )


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            _check_size(archive.zip.infolist(), path.stat().st_size)
            return dict(archive)
    except Exception as error:  # numpy and zipfile raise many kinds
        pickled = "pickle" in str(error)  # numpy's text says how to load it unsafely
        reason = "pickled objects" if pickled else first_line(error)
        raise UserError(
            f"{path}: not a whole .npz of plain arrays ({reason}): fetch it again"
        ) from error


def _check_size(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError for an archive that would fill the memory, a zip bomb."""
    whole = sum(member.file_size for member in members)
    if whole > max(MOST_RATIO * size, SMALL):
        raise ValueError(f"{size:,} bytes that become {whole:,}")


def _read_torch(path: Path) -> Any:
    """What torch.save wrote, with arrays for tensors, without optimizer state.

    Nothing but tensors, plain values and the reference's argparse.Namespace is made.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: needs PyTorch: pip install -e '.[torch]', or save the state dict "
            "as .safetensors elsewhere"
        ) from error
    try:
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        with allowed, warnings.catch_warnings(action="ignore"):
            tree = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),  # older files are pickles throughout
            )
        if isinstance(tree, Mapping):
            tree = {k: v for k, v in tree.items() if k != "opt"}
        return _arrays(tree)
    except Exception as error:  # torch raises many kinds
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, its pickle asks for {refused[1]}, which is code: "
                "save the state dict alone"
            ) from error
        raise UserError(
            f"{path}: not a whole PyTorch checkpoint ({first_line(error)}): fetch it "
            "again"
        ) from error


def _arrays(value: Any) -> Any:
    """Tensors as arrays; those of 32 bits or less as float32, which changes none."""
    if isinstance(value, Mapping):
        return {str(k): _arrays(v) for k, v in value.items()}
    if not hasattr(value, "detach"):
        return value
    value = value.detach()
    if value.is_floating_point() and value.itemsize <= 4:
        value = value.float()
    return value.numpy()


def first_line(error: BaseException) -> str:
    """The error's kind and what it says, in one line."""
    # Torch's comes after advice to load the file without any protection.
    said = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()
    return ": ".join([type(error).__name__, *(line[:200] for line in said[:1])])


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
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def check_writable(path: Path) -> None:
    """Refuse a file that `write_file` would."""
    if path.suffix not in WRITTEN:
        raise UserError(f"{path}: must end in {' or '.join(WRITTEN)}")
    if path.exists():
        raise UserError(f"{path}: exists already: name another file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no such folder: make it first")
