"""Latents that exist: REPA's folder, LightningDiT's, Hugging Face's tables, arrays.

Nothing is unpickled. Of what cannot be mapped a row group is in memory at a time, but
all of an .npz.
"""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import safe_open

from sra2_jax.data.tables import by_number, opened
from sra2_jax.weights.files import from_hub

LISTING = "dataset.json"
SAVED = "state.json"  # of datasets' save_to_disk
LABELS = "labels", "label"
# Names of a latent's moments, or of the latent itself, as people use them.
ONE = "moments", "data", "latents", "latent"
TWO = "mean", "std"


@dataclass(frozen=True)
class Latents:
    """A listing of latents.

    labels: (N,) integers; listed: what changes with the listing; load: position ->
    moments, or the latent, or mean and deviation, as they are stored; where: position
    -> where that is, for messages; channels: "first" where the kind of source says it;
    mirrored: whether position + N is the latent of the mirrored image; forward: whether
    only reading in ascending order is fast.
    """

    labels: np.ndarray
    listed: bytes
    load: Callable[[int], list[np.ndarray]]
    where: Callable[[int], Any]
    channels: str = ""
    mirrored: bool = False
    forward: bool = False


def fetch(source: str, inside: str, labels: str) -> tuple[str, Path]:
    """The source as a dataset names it, and the local file or folder.

    source: those, or `owner/name[@revision]` of the hub; of that `inside`, a folder,
    and the file `labels` are downloaded, all without. It is named with its commit.

    Raises UserError: none of these, or the hub does not deliver it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return source, path
    wanted = [f"{inside.rstrip('/')}/**", labels] if inside else None
    advice = "give a file, a folder or owner/name[@revision]"
    path = from_hub(source, advice, wanted, ("dataset", "model"))
    return f"{source.partition('@')[0]}@{path.name}", path


def open_latents(source: Path, split: str, labels: Path | None = None) -> Latents:
    """List the latents of a source.

    split: to read of one that has splits; labels: text file with one of each latent a
    line, where they do not lie with them.

    Raises ValueError and others: nothing that can be understood.
    """
    own = np.array(labels.read_text().split(), np.int64) if labels else None
    is_folder = source.is_dir()
    folders: list[Any] = [source, source / "vae-sd"]
    for path in source.glob("*.zip") if is_folder else [source]:
        if path.suffix == ".zip":
            root = zipfile.Path(zipfile.ZipFile(path))
            folders += [root, *(below for below in root.iterdir() if below.is_dir())]
    listed = [folder for folder in folders if (folder / LISTING).is_file()]
    tensors = _of_suffix(source, ".safetensors", split)
    if listed or tensors:
        if labels:
            raise ValueError("labels lie with these latents: leave out --labels")
        return _files(listed[0]) if listed else _safetensors(tensors)

    for folder in (source, source / split):
        if (folder / SAVED).is_file():
            rows = json.loads((folder / SAVED).read_text())["_data_files"]
            return _tables([folder / Path(row["filename"]).name for row in rows], own)
    for suffix in (".arrow", ".parquet"):
        if tables := _of_suffix(source, suffix, split):
            return _tables(tables, own)
    names = (*ONE, *TWO, *LABELS)
    if is_folder:
        paths = {name: source / f"{name}.npy" for name in names}
        # Not in memory; one with pickled objects is refused.
        mapped = functools.partial(np.lib.format.open_memmap, mode="r")
        arrays = {name: mapped(path) for name, path in paths.items() if path.exists()}
        return _arrays(source, arrays, own)
    # Opened here: np.load leaves a file that is no archive open.
    with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in names if name in archive}
        return _arrays(source, arrays, own)


def _of_suffix(source: Path, suffix: str, split: str) -> list[Path]:
    """The files of a suffix, in order; of the split, where names have one."""
    if not source.is_dir():
        return [source] if source.suffix == suffix else []
    found = sorted(source.rglob(f"*{suffix}"))
    splits = [re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) for path in found]
    if all(name != path.stem for name, path in zip(splits, found, strict=True)):
        found = [p for p, name in zip(found, splits, strict=True) if name == split]
        if splits and not found:
            raise ValueError(f"it has the splits {sorted(set(splits))}: --split")
    return found


def _files(folder: Any) -> Latents:
    """What `dataset.json` lists, in upstream's order, that of the names.

    folder: a path, or one in a zip.
    """
    text = (folder / LISTING).read_bytes()
    rows = sorted(json.loads(text)["labels"], key=lambda row: row[0])
    names, labels = [PurePosixPath(name) for name, _ in rows], [row[1] for row in rows]
    if not rows or any(type(label) is not int for label in labels):
        raise ValueError(f'{LISTING} needs {{"labels": [["00000/NAME.npy", 0], ...]}}')
    if len(set(names)) != len(names):
        raise ValueError(f"{LISTING} names a file twice")
    for name in names:
        if name.is_absolute() or ".." in name.parts or name.suffix != ".npy":
            raise ValueError(f"{LISTING}: {str(name)!r} is no .npy inside this folder")

    def where(index: int) -> Any:
        return folder / str(names[index])

    def load(index: int) -> list[np.ndarray]:
        with where(index).open("rb") as file:
            return [np.lib.format.read_array(file, allow_pickle=False)]

    return Latents(np.array(labels, np.int64), text, load, where, "first")


class _Parts:
    """Latents in parts, (file, how many), one after the other; `labels` of all."""

    def __init__(self, parts: Sequence[tuple[Path, int]], labels: np.ndarray) -> None:
        self.labels, self._parts = labels, parts
        self._ends = np.cumsum([count for _, count in parts])
        shape, kind = labels.shape, labels.dtype
        if (
            kind.kind not in "iu"
            or shape != (sum(n for _, n in parts),)
            or not shape[0]
        ):
            raise ValueError(
                f"labels {kind} {shape} for {sum(n for _, n in parts)} latents: needs "
                "an integer each"
            )
        facts = [(path.name, count) for path, count in parts]
        self.listed = repr(facts).encode() + np.ascontiguousarray(labels).tobytes()

    def find(self, index: int) -> tuple[int, int]:
        """The part of a latent, also of a mirrored one, and its row there."""
        index %= len(self.labels)
        part = int(np.searchsorted(self._ends, index, "right"))
        return part, index - int(self._ends[part]) + self._parts[part][1]

    def where(self, index: int) -> str:
        part, row = self.find(index)
        return f"{self._parts[part][0]}, latent {row}"


def _safetensors(paths: Sequence[Path]) -> Latents:
    """Files of `latents`, `latents_flip` and `labels`, as LightningDiT's extractor
    leaves them: latents as they were drawn, channels first."""
    files = [safe_open(path, framework="numpy") for path in paths]
    names = set(files[0].keys())
    if any(set(file.keys()) != names for file in files):
        raise ValueError("its files do not hold the same tensors")
    if not {"latents", "labels"} <= names:
        raise ValueError(f"it has {sorted(names)}; needs latents and labels")
    labels = [file.get_tensor("labels") for file in files]
    counts = list(zip(paths, map(len, labels), strict=True))
    parts = _Parts(counts, np.concatenate(labels))

    def load(index: int) -> list[np.ndarray]:
        part, row = parts.find(index)
        name = "latents" if index < len(parts.labels) else "latents_flip"
        return [files[part].get_slice(name)[row]]

    mirrored = "latents_flip" in names
    return Latents(parts.labels, parts.listed, load, parts.where, "first", mirrored)


def _tables(paths: Sequence[Path], own: np.ndarray | None) -> Latents:
    """Tables of Hugging Face's datasets, columns of nested lists."""
    found = [(path, part) for path in paths for part in opened(path) if part[0]]
    if not found:
        raise ValueError("it has no rows")
    tables = [part for _, part in found]
    used, label = _names(tables[0][1], own)
    if own is None:
        own = np.concatenate([read([label])[label].to_numpy() for *_, read in tables])
    parts = _Parts([(path, part[0]) for path, part in found], own)
    table = by_number(tables, used)

    def load(index: int) -> list[np.ndarray]:
        part, row = parts.find(index)
        columns = table(part)
        return [_cell(columns[name], row) for name in used]

    forward = paths[0].suffix == ".parquet"
    return Latents(own, parts.listed, load, parts.where, forward=forward)


def _cell(column: Any, row: int) -> np.ndarray:
    """The nested lists in a row of an Arrow array."""
    values, shape = column.slice(row, 1), []
    while True:
        if hasattr(values, "storage"):  # of an extension, as datasets' Array3D
            values = values.storage
        elif hasattr(values, "flatten"):
            inner = values.flatten()
            shape.append(len(inner) // len(values))
            values = inner
        else:
            return values.to_numpy(zero_copy_only=False).reshape(shape)


def _names(there: Sequence[str], own: np.ndarray | None) -> tuple[list[str], str]:
    """Of arrays or columns, those of the latents and that of the labels."""
    used = next(([name] for name in ONE if name in there), list(TWO))
    label = next((name for name in LABELS if name in there), "")
    if not {*used} <= {*there} or (own is None and not label):
        raise ValueError(
            f"it has {sorted(there)}; needs labels (or --labels), and moments, "
            "latents, or mean and std"
        )
    return used, label


def _arrays(
    source: Path, arrays: Mapping[str, np.ndarray], own: np.ndarray | None
) -> Latents:
    used, label = _names(list(arrays), own)
    labels = arrays[label] if own is None else own
    count, *others = [len(arrays[name]) for name in used]
    if others not in ([], [count]):
        raise ValueError(f"{count} and {others[0]} of {' and '.join(used)}")
    parts = _Parts([(source, count)], labels)
    facts = [(name, arrays[name].shape, arrays[name].dtype.str) for name in used]

    def load(index: int) -> list[np.ndarray]:
        return [arrays[name][index] for name in used]

    return Latents(labels, repr(facts).encode() + parts.listed, load, parts.where)
