"""Shards written so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sra2_jax.data import records
from sra2_jax.errors import UserError


@dataclasses.dataclass
class Facts:
    """What the manifest says of one shard, and sums of its latents per channel.

    mean: of E[z]; square: of E[z^2] = mean^2 + std^2; over records and positions.
    """

    records: int = 0
    bytes: int = 0
    sha256: str = ""
    first: int = -1
    last: int = -1
    mean: list[float] = dataclasses.field(default_factory=list)
    square: list[float] = dataclasses.field(default_factory=list)


def manifest(facts: Sequence[Facts]) -> records.Shards:
    """The manifest of all shards of a split, in order."""
    names = [field.name for field in dataclasses.fields(records.Shards)]
    return records.Shards(*(tuple(getattr(f, n) for f in facts) for n in names))


class ShardWriter:
    """Context manager that writes records to the shard index % shards.

    Listings are sorted by class: so every shard gets all classes. Shards have temporary
    names; once the context ends without an error, they are flushed to the disk and get
    their own.

    Args:
      folder: local.
      shards: number in all.
      own: the shards to write, by default all.
      tag: part of the temporary name.

    Raises:
      UserError: TensorFlow cannot write, such as to a disk that is full.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        shards: int,
        own: Sequence[int] | None = None,
        tag: str = "",
    ) -> None:
        self._shards, own = shards, range(shards) if own is None else own
        paths = {s: Path(records.shard_path(folder, split, s, shards)) for s in own}
        self._files = {s: _ShardFile(path, tag) for s, path in paths.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            if kind is None:
                file.commit()
            else:
                file.discard()

    def write(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        label: int,
        index: int,
        **extra: Any,
    ) -> None:
        """Append one record, see `records.serialize`."""
        record = records.serialize(mean, std, label, index, **extra)
        self._files[index % self._shards].write(record, index, mean, std)

    def facts(self) -> dict[int, Facts]:
        """Of each shard by its number; valid once the context has ended."""
        return {s: file.facts for s, file in self._files.items()}

    def shards(self) -> records.Shards:
        """The manifest, of a writer of all shards that has ended."""
        return manifest(list(self.facts().values()))


class _ShardFile:
    def __init__(self, path: Path, tag: str) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}{tag}.tmp")
        self._file = records.tensorflow().io.TFRecordWriter(str(self._temporary))
        self._sums: Any = 0.0
        self.facts = Facts()

    def write(
        self, record: bytes, index: int, mean: np.ndarray, std: np.ndarray
    ) -> None:
        self._try(self._file.write, record)
        facts = self.facts
        facts.first = min(index, facts.first) if facts.records else index
        facts.last = max(index, facts.last)
        facts.records += 1
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self._sums += np.stack([mean, mean**2 + std**2]).sum((1, 2))

    def commit(self) -> None:
        self._try(self._file.close)
        with self._temporary.open("rb") as file:
            self.facts.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.facts.bytes = file.tell()
            os.fsync(file.fileno())
        if self.facts.records:
            self.facts.mean, self.facts.square = self._sums.tolist()
        self._temporary.rename(self._path)
        flush(self._path.parent)

    def discard(self) -> None:
        # Closing writes what is left in memory: on a full disk that fails again.
        try:
            self._file.close()
        except records.tensorflow().errors.OpError:
            pass
        self._temporary.unlink(missing_ok=True)

    def _try(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except records.tensorflow().errors.OpError as error:
            reason = " ".join(error.message.split())
            raise UserError(
                f"{self._temporary}: cannot be written ({reason}): free or mend the "
                "disk and run the same command again"
            ) from error


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
