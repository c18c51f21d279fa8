"""Is a dataset of latents what was encoded? python -m sra2_jax encode --check=DIR.

Every byte is hashed and compared with the manifest.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from sra2_jax.data import records
from sra2_jax.storage import sha256, stat
from sra2_jax.tfrecord import Damaged, Shard


def run_check(folder: str | os.PathLike) -> int:
    """Check a dataset, print a line for each fault and one that sums up; exit status.

    Raises UserError: as `LatentsInfo.read`.
    """
    info, began = records.LatentsInfo.read(folder), time.monotonic()
    found = faults(folder, info)
    for name, reason in found:
        print(f"{name}: {reason}")
    size = sum(sum(shards.bytes) for shards in info.splits.values())
    seconds = time.monotonic() - began
    print(
        f"{folder}: {len(found) or 'no'} faults, {info.num_examples:,} records, "
        f"{size:,} bytes, {seconds:.1f} s"
    )
    return 1 if found else 0


def faults(
    folder: str | os.PathLike, info: records.LatentsInfo
) -> list[tuple[str, str]]:
    """(file, what is wrong with it) of every bad shard and of shards too many."""
    shards = {
        records.shard_path(folder, split, number, len(of.records)): (of, number)
        for split, of in info.splits.items()
        for number in range(len(of.records))
    }
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(lambda path: _fault(path, *shards[path]), shards)
    found = [(p.name, why) for p, why in zip(shards, reasons, strict=True) if why]
    strays = sorted({*epath.Path(folder).glob("*.tfrecord*")} - shards.keys())
    return found + [(p.name, f"not in {records.FILE}: remove it") for p in strays]


def _fault(path: epath.Path, shards: records.Shards, number: int) -> str:
    """What is wrong with a shard, "" if nothing is."""
    if not path.exists():
        return "missing"
    size, wanted = stat(path)[0], shards.bytes[number]
    if size != wanted:
        return f"{size} bytes, {wanted} when it was encoded"
    if shards.sha256 and sha256(path) == shards.sha256[number]:
        return ""
    try:
        shard = Shard(path)
        count = len(shard)
        for i in range(count):
            shard.read(i, np.empty(shard.size(i), np.uint8))
    except Damaged as error:
        return str(error)
    if count != shards.records[number]:
        return f"{count} records, {shards.records[number]} when it was encoded"
    return "SHA-256 differs; every record can be read" if shards.sha256 else ""
