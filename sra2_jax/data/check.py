"""Is a dataset of latents what was encoded? python -m sra2_jax encode --check=DIR.

Every byte is hashed and compared with the manifest, and every record is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from sra2_jax.data import records

_BATCH = 128  # records: with features, 50 MB a thread
_BLOCK = 2**20


def run_check(folder: str | os.PathLike) -> int:
    """Check a dataset, print a line for each fault or one that sums up; exit status."""
    info = records.LatentsInfo.read(folder)
    records.tensorflow()  # takes seconds itself
    began = time.monotonic()
    found = faults(folder, info)
    for name, reason in found:
        print(f"{name}: {reason}")
    seconds = time.monotonic() - began
    size = sum(sum(shards.bytes) for shards in info.splits.values())
    shards = sum(len(shards.bytes) for shards in info.splits.values())
    sums = all(shards.sha256 for shards in info.splits.values())
    known = "" if sums else " (no SHA-256 in latents.json: contents alone)"
    count = "1 fault" if len(found) == 1 else f"{len(found) or 'no'} faults"
    print(
        f"{folder}: {count}, {info.num_examples:,} records in {shards} shards, "
        f"{size:,} bytes, {seconds:.1f} s, "
        f"{info.num_examples / seconds:,.0f} records/s{known}"
    )
    return 1 if found else 0


def faults(
    folder: str | os.PathLike, info: records.LatentsInfo
) -> list[tuple[str, str]]:
    """(file, what is wrong with it) of every bad shard and of shards too many."""
    found, expected = [], set()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for split, shards in info.splits.items():
            count = len(shards.records)
            paths = [records.shard_path(folder, split, s, count) for s in range(count)]
            expected |= {path.name for path in paths}
            one = [_Shard(path, s, shards, info) for s, path in enumerate(paths)]
            reasons = pool.map(_Shard.fault, one)
            found += [(p.name, r) for p, r in zip(paths, reasons, strict=True) if r]
    strays = {path.name for path in epath.Path(folder).glob("*.tfrecord*")} - expected
    reason = f"not in {records.FILE}: remove it"
    return found + [(name, reason) for name in sorted(strays)]


class _Shard:
    def __init__(
        self,
        path: epath.Path,
        number: int,
        shards: records.Shards,
        info: records.LatentsInfo,
    ) -> None:
        self._path, self._number, self._info = path, number, info
        self._shards = shards

    def fault(self) -> str:
        """What is wrong, "" if nothing is."""
        if not self._path.exists():
            return "missing"
        return self._bytes() or self._contents()

    def _bytes(self) -> str:
        size = self._path.stat().length
        wanted = self._shards.bytes[self._number]
        if not size and wanted:
            return f"empty, {wanted} bytes when it was encoded"
        digests = self._shards.sha256
        if not digests and size == wanted:
            return ""
        whole, start = _sha256(self._path, wanted)
        if digests and whole == digests[self._number]:
            return ""
        if whole in digests:
            return f"a copy of shard {digests.index(whole)}"
        if size < wanted:
            return f"truncated to {size} of {wanted} bytes"
        if size > wanted:
            rest = "" if not digests or start == digests[self._number] else ", not only"
            return f"{size - wanted} bytes too many at its end{rest}"
        # Of the same size: a record says more than a sum.
        other = f"other bytes than encoded (SHA-256 {whole})"
        return self._contents() or f"{other}, though every record can be read"

    def _contents(self) -> str:
        shards, number = self._shards, self._number
        position, indices = 0, [np.zeros(0, np.int64)]
        try:
            for batch in _parsed(self._path, self._info, self._fields()):
                if wrong := self._batch(batch, position):
                    return wrong
                position += len(batch["index"])
                indices.append(batch["index"])
        except records.tensorflow().errors.OpError as error:
            _, found = damaged(self._path, self._info, self._fields())
            return found or _one_line(error)
        if position != shards.records[number]:
            return f"{position} records, {shards.records[number]} when it was encoded"
        index = np.concatenate(indices)
        values, counts = np.unique(index, return_counts=True)
        if (counts > 1).any():
            twice = values[counts > 1][0]
            where = " and ".join(map(str, np.flatnonzero(index == twice)[:2]))
            return f"index {twice} twice, in records {where}"
        span = (values[0], values[-1]) if position else (-1, -1)
        if shards.first and span != (shards.first[number], shards.last[number]):
            wanted = f"{shards.first[number]} to {shards.last[number]}"
            return f"indices {span[0]} to {span[1]}, {wanted} when it was encoded"
        return ""

    def _fields(self) -> Sequence[str]:
        # Images are not decoded: that would be fifty times slower than their hash.
        return ("features",) if self._info.features else ()

    def _batch(self, batch: dict[str, np.ndarray], position: int) -> str:
        index, count = batch["index"], len(self._shards.records)
        strange = np.flatnonzero((index < 0) | (index % count != self._number))
        if strange.size:
            row = strange[0]
            return f"record {position + row} has index {index[row]}, of another shard"
        label = batch["label"]
        wrong = np.flatnonzero((label < 0) | (label >= self._info.num_classes))
        if wrong.size:
            row, classes = wrong[0], self._info.num_classes
            return f"record {position + row}: label {label[row]}, not in [0, {classes})"
        for name in ("mean", "std", *self._fields()):
            # The exponent of infinities and NaN; eight times faster than isfinite.
            bits = batch[name].view(np.uint16) & 0x7C00
            bad = (bits == 0x7C00).reshape(len(bits), -1).any(1)
            if bad.any():
                return f"record {position + bad.argmax()}: {name} is not finite"
        return ""


def damaged(
    path: Any, info: records.LatentsInfo, fields: Sequence[str] = ()
) -> tuple[int, str]:
    """How many records of a shard can be read, and what is wrong with the next one.

    fields: as of `records.parse`. The second is "" at the end of the shard.
    """
    tf = records.tensorflow()
    position = 0
    with contextlib.suppress(tf.errors.OpError):
        for batch in _parsed(path, info, fields):
            position += len(batch["index"])
        return position, ""
    # Somewhere in the batch that begins here.
    try:
        for row in tf.data.TFRecordDataset(str(path)).skip(position):
            records.parse(row[None], info, fields)
            position += 1
    except tf.errors.DataLossError as error:
        return position, f"record {position} is damaged ({_one_line(error)})"
    except tf.errors.OpError as error:
        return position, f"record {position} cannot be parsed ({_one_line(error)})"
    return position, ""


def _one_line(error: Any) -> str:
    # Without the name of TensorFlow's operation, and without its trace.
    text = re.sub(r"^\{\{.*?\}\} ", "", " ".join(error.message.split()))
    return text.partition(" [Op:")[0][:120]


def _parsed(
    path: Any, info: records.LatentsInfo, fields: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    dataset = records.tensorflow().data.TFRecordDataset(str(path)).batch(_BATCH)
    for batch in dataset:
        yield {k: v.numpy() for k, v in records.parse(batch, info, fields).items()}


def _sha256(path: epath.Path, size: int) -> tuple[str, str]:
    """Of the whole file, and of its first `size` bytes if it has more."""
    digest, start = hashlib.sha256(), ""
    left = size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if not start and len(block) > left:
                part = digest.copy()
                part.update(block[:left])
                start = part.hexdigest()
            digest.update(block)
            left -= len(block)
    return digest.hexdigest(), start
