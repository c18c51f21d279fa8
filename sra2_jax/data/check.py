"""Is a dataset of latents what was encoded? python -m sra2_jax encode --check=DIR.

Every byte is hashed and compared with the manifest, and every record is read.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from sra2_jax.data import records
from sra2_jax.data.pipeline import read_shard
from sra2_jax.errors import UserError


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
    jobs = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for split, shards in info.splits.items():
            count = len(shards.records)
            for number in range(count):
                path = records.shard_path(folder, split, number, count)
                jobs[path] = pool.submit(_fault, path, number, shards, info)
    found = [(path.name, job.result()) for path, job in jobs.items()]
    strays = sorted({*epath.Path(folder).glob("*.tfrecord*")} - jobs.keys())
    found += [(path.name, f"not in {records.FILE}: remove it") for path in strays]
    return [(name, reason) for name, reason in found if reason]


def _fault(
    path: epath.Path, number: int, shards: records.Shards, info: records.LatentsInfo
) -> str:
    """What is wrong with a shard, "" if nothing is."""
    if not path.exists():
        return "missing"
    size, wanted = path.stat().length, shards.bytes[number]
    if size != wanted:
        return f"{size} bytes, {wanted} when it was encoded"
    contents = _wrong_contents(path, number, shards, info)
    if shards.sha256 and _sha256(path) != shards.sha256[number]:
        return f"SHA-256 differs; {contents or 'every record can be read'}"
    return contents


def _wrong_contents(
    path: epath.Path, number: int, shards: records.Shards, info: records.LatentsInfo
) -> str:
    # Images are not decoded: that would be fifty times slower than their hash.
    fields = ("features",) if info.features else ()
    position = 0
    try:
        for rows in read_shard(path, info, fields):
            label, index = rows["label"], rows["index"]
            wrong = (label < 0) | (label >= info.num_classes)
            wrong |= (index < 0) | (index % len(shards.records) != number)
            if wrong.any():
                row = wrong.argmax()
                return (
                    f"record {position + row} has label {label[row]} and index "
                    f"{index[row]}, which cannot be here"
                )
            position += len(label)
    except UserError as error:
        return str(error)
    if position != shards.records[number]:
        return f"{position} records, {shards.records[number]} when it was encoded"
    return ""


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
