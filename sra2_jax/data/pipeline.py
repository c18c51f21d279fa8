"""Batches of latents, read ahead, in the order of `data.order`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sra2_jax.data import records
from sra2_jax.data.images import in_threads
from sra2_jax.data.order import Order
from sra2_jax.errors import UserError, one_line
from sra2_jax.storage import stat
from sra2_jax.tfrecord import Damaged, Shard

THREADS = 4  # batches that are put together at once

# Open shards by number, and rows: int64 (n, 2), the shard and the record in it.
Part = tuple[Mapping[int, Future[Shard]], np.ndarray]


def batches(
    folder: str | os.PathLike,
    order: Order,
    start_step: int = 0,
    fields: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches start_step, start_step + 1, ...

    folder: dataset of latents, local or gs://; start_step: batches to skip, of which
    nothing is read; fields: "image", "features", "captions", to read them as well, in
    the same order; process_count: divides a batch, whose rows follow from order and
    step alone.

    Returns an endless iterator of what `records.read` gives, latents not scaled.

    Raises UserError: at once, a split, a field or shards that do not fit; while
    iterating, a record that cannot be read.
    """
    info = records.LatentsInfo.read(folder)
    records.check_fields(info, folder, fields)
    if order.split not in info.splits:
        raise UserError(
            f"{folder}: no split {order.split!r}, only {sorted(info.splits)}; change "
            "the split in the config or encode that one"
        )
    shards = info.splits[order.split]
    count = len(shards.records)
    paths = [records.shard_path(folder, order.split, s, count) for s in range(count)]
    for path, size in zip(paths, shards.bytes, strict=True):
        found = stat(path)[0] if path.exists() else 0
        if found != size:
            raise UserError(
                f"{folder}: shard {path.name} has {found or 'no'} bytes, {size} "
                "when it was encoded; copy it again or encode again"
            )

    local = order.batch_size // process_count
    own = slice(process_index * local, (process_index + 1) * local)

    def read(parts: Sequence[Part]) -> dict[str, np.ndarray]:
        places = [(opened, *row) for opened, part in parts for row in part.tolist()]
        rows, shard = [], 0
        try:
            for opened, shard, number in places[own]:
                rows.append((opened[shard].result(), number))
            return records.read(rows, info, fields)
        except (Damaged, OSError) as error:
            path = error.path if isinstance(error, Damaged) else paths[shard]
            raise UserError(
                f"{folder}: {path.name} cannot be read ({one_line(error)}): copy that "
                "shard again or encode again"
            ) from error

    def generate() -> Iterator[dict[str, np.ndarray]]:
        pool = ThreadPoolExecutor(4, thread_name_prefix="shards")

        def opened(rows: np.ndarray) -> Part:
            needed = np.unique(rows[:, 0]).tolist()
            return {s: pool.submit(Shard, paths[s]) for s in needed}, rows

        rows = order.blocks(shards.records, start_step)
        # A block's shards are opened while those of the one before are read.
        blocks = (block for block, _ in itertools.pairwise(map(opened, rows)))
        groups = _regrouped(blocks, order.batch_size)
        try:
            for _, batch in in_threads(read, groups, THREADS, THREADS):
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return generate()


def _regrouped(blocks: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """The same rows, `size` at a time."""
    parts: list[Part] = []
    missing = size
    for opened, rows in blocks:
        while len(rows):
            parts.append((opened, rows[:missing]))
            rows, missing = rows[missing:], missing - len(parts[-1][1])
            if not missing:
                yield parts
                parts, missing = [], size


def prefetch_to_device(
    iterator: Iterator[Mapping[str, np.ndarray]], sharding: Any
) -> Generator[dict[str, jax.Array]]:
    """Batches placed on the devices ahead of time, in a thread that ends with this.

    iterator: local rows of global batches, as `batches` yields them; sharding: splits
    the leading axis of every array.

    Yields dicts of global jax.Array. Raises what `iterator` raises.
    """

    def place(rows: Iterator[Mapping[str, np.ndarray]]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in next(rows, {}).items()
        }

    # Of three, one is in use and two wait on the devices.
    for _, batch in in_threads(place, itertools.repeat(iterator), 1, 3):
        if not batch:  # the end of `iterator`
            return
        yield batch
