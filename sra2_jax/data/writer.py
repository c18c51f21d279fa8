"""Shards written so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
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
    unreadable: (index, line of the report) of the images that left no record.
    """

    records: int = 0
    bytes: int = 0
    sha256: str = ""
    first: int = -1
    last: int = -1
    mean: list[float] = dataclasses.field(default_factory=list)
    square: list[float] = dataclasses.field(default_factory=list)
    unreadable: list[tuple[int, str]] = dataclasses.field(default_factory=list)


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

    Attributes:
      facts: of each shard by its number; valid once the context has ended.
      skipped: images that left no record, in all shards that the caller counts.

    Raises:
      UserError: TensorFlow cannot write, such as to a disk that is full.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        shards: int,
        own: Sequence[int] | None = None,
    ) -> None:
        self._shards, own = shards, range(shards) if own is None else own
        paths = {s: Path(records.shard_path(folder, split, s, shards)) for s in own}
        self._files = {s: _ShardFile(path) for s, path in paths.items()}
        self.facts = {s: file.facts for s, file in self._files.items()}
        self.skipped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            if kind is None:
                file.commit()
            else:
                file.discard()

    def write(
        self, label: int, index: int, image: bytes | None = None, **arrays: np.ndarray
    ) -> None:
        """Append one record, see `records.serialize`; `arrays` are made float16.

        Raises:
          UserError: numbers that float16 does not hold.
        """
        with np.errstate(over="ignore"):
            halves = {name: x.astype(np.float16) for name, x in arrays.items()}
        for name, x in halves.items():
            if not np.isfinite(x).all():
                raise UserError(
                    f"the {name} of image {index} is not finite or too large for "
                    "float16: encode it with --dtype=float32, or check the weights"
                )
        record = records.serialize(label=label, index=index, image=image, **halves)
        file = self._files[index % self._shards]
        file.write(record, index, halves["mean"], halves["std"])

    def skip(self, index: int, line: str) -> int:
        """Note an image that leaves no record; returns how many there are."""
        self.facts[index % self._shards].unreadable.append((index, line))
        self.skipped += 1
        return self.skipped


class _ShardFile:
    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, temporary_name(path)
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
        if not self._temporary.exists():
            raise UserError(
                f"{self._path}: another process has written it too; give each a "
                "--process_index of --process_count"
            )
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
        with contextlib.suppress(records.tensorflow().errors.OpError):
            self._file.close()
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


def temporary_name(path: Path) -> Path:
    """A name beside a file for as long as it is written, different every time: should
    two processes write the same file, each writes its own."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
