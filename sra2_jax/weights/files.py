"""Files of weights: folders of the hub, and state dicts; names to arrays.

A folder holds config.json and one safetensors file, or, sharded, that file's name with
.index.json and the files it lists. A state dict is a .safetensors, a .npz or one of
PyTorch's. No code that a file brings is run.
"""

import argparse
import contextlib
import dataclasses
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sra2_jax.config import DIGITS, WORDS
from sra2_jax.config_file import HUB_ID
from sra2_jax.errors import UserError, explained
from sra2_jax.storage import read_json, whole_file
from sra2_jax.weights import tree

CONFIG = "config.json"
INDEX = ".index.json"  # added to the name of a sharded file
ASSETS = Path(__file__).parents[1] / "assets"
LARGEST = 2**16  # number in a config: a larger one is a mistake, or an attack
# the reference's names of its sets of weights -> ours
SETS = {"model": "raw", "ema": "ema"}
READ = SETS | {"ema_model": "ema"}  # of other code
WRITTEN = (".safetensors", ".npz")
Network = TypeVar("Network", bound=Any)
REVERSED = "noise to data"  # note of a network that runs so
AGAIN = (
    "fetch it again, or save a dict of plain tensors as .safetensors; PyTorch's files "
    "need it: pip install -e '.[torch]'"
)


# Folders


def fetch(source: str, weights: str, *others: str) -> Path:
    """The local folder of `source`: a folder, a hub id, or "digits", "mnist", "words",
    which are shipped with this package. weights: the file wanted in it, and others.

    Raises UserError: a whole pipeline, or as `from_hub`.
    """
    if source == WORDS:
        return ASSETS / WORDS
    if source in DIGITS:
        for path in ASSETS.glob(f"{source}_*/{weights}"):
            return path.parent
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).exists() and (folder / "vae" / CONFIG).exists():
            raise UserError(f"{source}: is a whole pipeline: give {source}/vae")
        return folder
    shards = weights.replace(".safetensors", "-*.safetensors")
    advice = f"give a folder with {CONFIG} and {weights}, or owner/name[@revision]"
    wanted = [CONFIG, weights, weights + INDEX, shards, *others]
    return from_hub(source, advice, wanted)


def from_hub(
    source: str,
    advice: str,
    patterns: Sequence[str] | None,
    kinds: Sequence[str] = ("model",),
) -> Path:
    """The local folder of `owner/name[@revision]`, downloaded: the files that fit one
    of the patterns, of the first of these kinds of repository that there is. With
    HF_HUB_OFFLINE=1 what was downloaded before is used.

    Raises UserError: no hub id, or the hub does not deliver it.
    """
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None or Path(source).exists():
        raise UserError(f"{source}: no such folder, and not a hub id either; {advice}")
    # Imported here: it takes a second, and local folders do not need it.
    from huggingface_hub import errors, snapshot_download

    none = errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError
    where: Any = {"revision": hub_id["revision"], "allow_patterns": patterns}
    check = f"check the name, the network and HF_HUB_OFFLINE, or {advice}"
    with explained(f"{source}: not from the hub", check):
        for kind in kinds[:-1]:
            with contextlib.suppress(*none):
                return Path(snapshot_download(hub_id["repo"], repo_type=kind, **where))
        return Path(snapshot_download(hub_id["repo"], repo_type=kinds[-1], **where))


def read_weights(folder: Path, weights: str) -> dict[str, np.ndarray]:
    """All tensors of a folder by their name. Raises UserError: a damaged file."""
    if not any((folder / (weights + end)).exists() for end in ("", INDEX)):
        half = weights.replace(".safetensors", ".fp16.safetensors")
        weights = half if (folder / half).exists() else weights
    index, names = folder / (weights + INDEX), {weights}
    tensors: dict[str, np.ndarray] = {}
    with explained(f"{index}: cannot be read", AGAIN):
        if index.is_file():
            names = set(read_json(index)["weight_map"].values())
        for name in sorted(names):
            tensors |= _read(folder / Path(name).name)  # it cannot leave the folder
    return tensors


@dataclasses.dataclass(frozen=True)
class Format(Generic[Network]):
    """How a library keeps a network in a folder.

    Attributes:
      weights: name of the safetensors file; network, config: our classes.
      only: keys with one value that we implement.
      name: of our modules in the file; current: tensors by the names of today.
      part: key of our network's config, in the config of a model of several.
    """

    weights: str
    network: Callable[[Any], Network]
    config: type[Any]
    only: Mapping[str, Any]
    name: tree.Name
    current: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    part: str = ""

    def describe(self, source: str) -> tuple[Path, Network]:
        """The folder of `source` and its network.

        Raises UserError: as `fetch`, no JSON, or no network that is implemented.
        """
        folder = fetch(source, self.weights)
        path = folder / CONFIG
        whole = read_json(path)
        own = whole.get(self.part, whole)
        found = {k: v for k, v in own.items() if v is not None}
        for key, only in self.only.items():
            if (value := found.get(key)) != only:
                wanted = f"only {only!r} is supported, choose another model"
                raise UserError(f"{path}: {key} is {value!r:.80}; {wanted}")
        with explained(f"{path}: not of this kind of network", "choose another model"):
            # A key that is missing, since it is younger than the file, has its default.
            known = {f.name for f in dataclasses.fields(self.config)} & found.keys()
            values = {key: found[key] for key in known}
            for key, value in values.items():
                parts = tuple(value) if isinstance(value, list) else (value,)
                numbers = [x for x in parts if isinstance(x, int | float)]
                if not all(abs(x) <= LARGEST for x in numbers):  # also refuses NaN
                    raise ValueError(f"{key} is {value!r:.80}, at most {LARGEST}")
                values[key] = parts if isinstance(value, list) else value
            return folder, self.network(self.config(**values))

    def load(self, source: str) -> tuple[Network, tree.Params]:
        """The module, which computes in float32, and its parameters, float32 arrays of
        numpy. source: see `fetch`.

        Raises UserError: as `describe`, a damaged file, or tensors that do not fit the
        config.
        """
        folder, module = self.describe(source)
        with explained(f"{folder / CONFIG}: makes no network", "choose another model"):
            wanted = module.shapes()
        tensors = self.current(read_weights(folder, self.weights))
        complaint = f"{folder}: weights of another network than that of {CONFIG}"
        patch = getattr(module.config, "patch_size", 1)
        return module, tree.read(tensors, wanted, self.name, complaint, patch)

    def save(self, folder: str | Path, config: Any, params: tree.Params) -> None:
        """Write what `load`, and the library's `from_pretrained`, reads, each tensor in
        its own dtype; files of the same name are replaced."""
        folder = Path(folder)
        tensors = tree.write(params, self.name, getattr(config, "patch_size", 1))
        folder.mkdir(parents=True, exist_ok=True)
        # A stale index would win over the new file, here and in the libraries.
        (folder / (self.weights + INDEX)).unlink(missing_ok=True)
        save_file(tensors, folder / self.weights, metadata={"format": "pt"})
        fields = {k: v for k, v in dataclasses.asdict(config).items() if v != ()}
        text = json.dumps(fields | dict(self.only), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


# State dicts


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds, and what it says of that."""

    # "raw", "ema", or "unnamed" where it does not say which -> names -> arrays
    sets: dict[str, dict[str, np.ndarray]]
    step: int | None  # training steps done
    heads: int | None  # of the attention
    reverse: bool  # time runs from noise to data


def read_file(path: Path) -> Contents:
    """Read a checkpoint of the reference code, or one that `write_file` wrote: a state
    dict, or a dict with model, ema or both (in flat files name prefixes, "ema." or
    "ema/"), perhaps below state_dict.

    Raises UserError: no such file, another kind, damaged, a pickle that asks for code,
    or tensors beside its sets, which nothing would read.
    """
    found = {re.sub(r"^(state_dict\.)+", "", k): v for k, v in _read(path).items()}
    notes: Mapping[str, str] = {}
    with explained(f"{path}: cannot be read", AGAIN):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                notes = file.metadata() or {}
        counts = found.get("steps", notes.get("step")), notes.get("num_heads")
        step, heads = (None if count is None else int(count) for count in counts)
    tensors = {k: v for k, v in found.items() if isinstance(v, np.ndarray) and v.ndim}
    sets: dict[str, dict[str, np.ndarray]] = {}
    beside = []
    for name, tensor in tensors.items():
        key = re.split("[./]", name)[0]
        if key in READ:
            sets.setdefault(READ[key], {})[name[len(key) + 1 :]] = tensor
        else:
            beside.append(name)
    if sets and beside:
        raise UserError(
            f"{path}: {beside[0]} and {len(beside) - 1} more tensors are in none of "
            f"the sets {', '.join(READ)}: leave them out, or put them into one"
        )
    reverse = notes.get("time") == REVERSED
    return Contents(sets or {"unnamed": tensors}, step, heads, reverse)


def _read(path: Path) -> dict[str, Any]:
    """The names of a file and what they hold: arrays, of PyTorch plain values too."""
    readers: dict[str, Callable[[Path], dict[str, Any]]]
    readers = {".npz": read_npz, ".safetensors": load_file}
    readers |= dict.fromkeys((".pt", ".pth", ".ckpt"), _read_torch)
    if path.suffix not in readers or not path.is_file():
        raise UserError(f"{path}: no such file, or not one of {', '.join(readers)}")
    with explained(f"{path}: cannot be read", AGAIN):
        return readers[path.suffix](path)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz without pickled objects, by name."""
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
        try:
            tree = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),  # older files are pickles throughout
            )
        except pickle.UnpicklingError as error:
            # It comes after advice to load the file without any protection.
            raise ValueError(str(error).split("Unpickler error: ")[-1]) from None
    found = {}
    for key, value in traverse_util.flatten_dict(tree).items():
        if hasattr(value, "detach"):
            # numpy has no bfloat16
            small = value.is_floating_point() and value.itemsize <= 4
            value = (value.float() if small else value).detach().numpy()
        if "opt" not in key:
            found[".".join(map(str, key))] = value
    return found


def write_file(
    path: epath.Path, tensors: Mapping[str, Any], notes: Mapping[str, str]
) -> None:
    """Write a state dict whole or not at all; an .npz has no place for the notes.

    Raises UserError: it cannot be written.
    """
    with explained(f"{path}: not written", "use another"), whole_file(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **tensors)
        else:
            save_file(dict(tensors), file.name, dict(notes))
            _sort_notes(file.name)


def _sort_notes(path: str) -> None:
    """Of a .safetensors, which is written with them in any order: the same contents
    are to be the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(size))
