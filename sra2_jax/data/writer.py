"""Shards written so that a half-written one is never taken for a whole one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Writes records to the shard index % shards, see `writing`.

    Listings are sorted by class: so every shard gets all classes.

    Attributes:
      facts: of each shard by its number; whole once `writing` has ended.
      skipped: images that left no record, in all shards that the caller counts.
    """

    def __init__(self, shards: int, files: Mapping[int, Any]) -> None:
        self._shards, self._files = shards, files
        self.facts = {shard: Facts() for shard in files}
        self.skipped = 0

    def write(
        self, label: int, index: int, image: bytes | None = None, **arrays: np.ndarray
    ) -> None:
        """Append one record, see `records.serialize`; `arrays` are made float16.

        Raises UserError: numbers that float16 does not hold.
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
        self._files[index % self._shards].write(record)
        facts = self.facts[index % self._shards]
        mean, std = (halves[name].astype(np.float64) for name in records.MOMENTS)
        sums = np.stack([mean, mean**2 + std**2]).sum((1, 2))
        if facts.records:
            sums += [facts.mean, facts.square]
        facts.mean, facts.square = sums.tolist()
        facts.first = min(index, facts.first) if facts.records else index
        facts.last = max(index, facts.last)
        facts.records += 1

    def skip(self, index: int, line: str) -> int:
        """Note an image that leaves no record; returns how many there are."""
        self.facts[index % self._shards].unreadable.append((index, line))
        self.skipped += 1
        return self.skipped


@contextlib.contextmanager
def writing(
    folder: str | os.PathLike, split: str, shards: int, own: Iterable[int] | None = None
) -> Iterator[ShardWriter]:
    """A writer of the shards `own`, by default all, in a local folder.

    They have temporary names; once the context ends without an error, they are flushed
    to the disk and get their own.

    Raises UserError: TensorFlow cannot write, such as to a disk that is full.
    """
    tf, paths, files = records.tensorflow(), {}, {}
    try:
        with contextlib.ExitStack() as stack:
            for shard in range(shards) if own is None else own:
                path = Path(records.shard_path(folder, split, shard, shards))
                # Should two processes write the same shard, each writes its own file.
                temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                paths[shard] = temporary, path
                stack.callback(temporary.unlink, missing_ok=True)
                files[shard] = tf.io.TFRecordWriter(str(temporary))
                stack.callback(files[shard].close)
            writer = ShardWriter(shards, files)
            yield writer
            for shard, facts in writer.facts.items():
                files[shard].close()
                _commit(*paths[shard], facts)
    except tf.errors.OpError as error:
        raise UserError(
            f"{folder}: not finished ({records.reason(error)}): free or mend the disk "
            "and run the same command again"
        ) from error


def _commit(temporary: Path, path: Path, facts: Facts) -> None:
    if not temporary.exists():
        raise UserError(
            f"{path}: another process has written it too; give each a "
            "--process_index of --process_count"
        )
    with temporary.open("rb") as file:
        facts.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        facts.bytes = file.tell()
        os.fsync(file.fileno())
    temporary.rename(path)
