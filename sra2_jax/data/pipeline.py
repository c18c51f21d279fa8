"""Batches of latents in an order that depends on the seed and the step alone.

Row r of the global batch belongs to the virtual stream r // (batch_size // streams).
Stream v owns the shards s with s % streams == v and walks them epoch by epoch, forever.
A process reads the streams of its rows only: the global batch is the same for every
number of processes. What a stream has consumed follows from the step.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sra2_jax.data import records
from sra2_jax.errors import UserError

# Files that a stream reads at once, and records taken from each in turn.
_OPEN_FILES = 4
_BLOCK = 16


@dataclass(frozen=True)
class Order:
    """What the order of the batches of a dataset follows from.

    batch_size: rows of the GLOBAL batch; streams: virtual ones, whatever the number of
    processes; shuffle_buffer: records to shuffle among, over all streams.
    """

    batch_size: int
    seed: int
    streams: int
    shuffle_buffer: int
    split: str = "train"

    @classmethod
    def of(cls, config: Any) -> Order:
        """That of a run."""
        data = config.data
        return cls(config.batch_size, config.seed, data.streams, data.shuffle_buffer)


def batches(
    folder: str | os.PathLike,
    order: Order,
    start_step: int = 0,
    fields: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches start_step, start_step + 1, ...

    Args:
      folder: dataset of latents, local or gs://.
      start_step: batches to skip; reads at most one epoch of raw records for it.
      fields: "image" and "features", to read them as well, in the same order.

    Returns:
      An endless iterator of `mean`, `std` (local_B, h, w, c) float16, not scaled,
      `label` (local_B,) int32, `index` (local_B,) int64, and as asked for `image`
      (local_B, R, R, 3) uint8, `features` (local_B, tokens, width) float16.

    Raises:
      UserError: at once, numbers, split, field or shards that do not fit; while
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
    count, streams = len(shards.records), order.streams
    if order.batch_size % streams or streams % process_count or streams > count:
        raise UserError(
            f"{folder}: {streams} data streams must divide a batch of "
            f"{order.batch_size}, be a multiple of {process_count} processes and at "
            f"most {count}, the shards; change config.data.streams or encode again "
            f"with --shards={streams}"
        )
    owned, rows = streams // process_count, order.batch_size // streams
    paths = [records.shard_path(folder, order.split, s, count) for s in range(count)]
    parts: list[Any] = []
    for v in range(process_index * owned, (process_index + 1) * owned):
        own = slice(v, None, streams)
        for path, size in zip(paths[own], shards.bytes[own], strict=True):
            found = path.stat().length if path.exists() else 0
            if found != size:
                raise UserError(
                    f"{folder}: shard {path.name} has {found or 'no'} bytes, {size} "
                    "when it was encoded; copy it again or encode again"
                )
        total = sum(shards.records[own])
        if not total:
            raise UserError(
                f"{folder}: no records in shard {v} and the others of its stream; use "
                "fewer data streams"
            )
        stream = _stream(
            [str(path) for path in paths[own]],
            total,
            seed=(order.seed, v),
            consumed=start_step * rows,
            shuffle_buffer=-(-order.shuffle_buffer // streams),
        )
        parts.append(stream.batch(rows))
    return _joined(parts, info, fields, folder)


def _stream(
    paths: Sequence[str],
    total: int,
    seed: tuple[int, int],
    consumed: int,
    shuffle_buffer: int,
) -> Any:
    """The endless tf.data stream of `total` raw records, from record `consumed` on."""
    tf = records.tensorflow()
    first, offset = divmod(consumed, total)
    # 63 bits of (seed, stream) by a hash that numpy promises to keep stable.
    key = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)

    def epoch(number: Any) -> Any:
        draws = tf.random.stateless_uniform(
            [len(paths) + 1],
            seed=tf.stack([tf.constant(key, tf.int64), number]),
            minval=None,
            maxval=None,
            dtype=tf.int64,
            alg="philox",
        )
        files = tf.gather(tf.constant(paths), tf.argsort(draws[1:], stable=True))
        return (
            tf.data.Dataset.from_tensor_slices(files)
            .interleave(tf.data.TFRecordDataset, _OPEN_FILES, _BLOCK)
            .shuffle(min(shuffle_buffer, total), draws[0], False)
            # Raw records: ten times cheaper to skip than parsed ones.
            .skip(tf.where(number == first, tf.constant(offset, tf.int64), 0))
        )

    return tf.data.Dataset.range(first, np.iinfo(np.int64).max).flat_map(epoch)


def _joined(
    parts: Sequence[Any], info: records.LatentsInfo, fields: Sequence[str], folder: Any
) -> Iterator[dict[str, np.ndarray]]:
    """One batch of each stream, parsed and concatenated."""
    tf = records.tensorflow()

    def parse(*serialized: Any) -> dict[str, Any]:
        # Parsed first: concatenating strings copies them one by one, 1.3 times slower.
        parsed = [records.parse(rows, info, fields) for rows in serialized]
        return {key: tf.concat([rows[key] for rows in parsed], 0) for key in parsed[0]}

    auto = tf.data.AUTOTUNE
    streams = tf.data.Dataset.zip(tuple(part.prefetch(auto) for part in parts))
    joined = streams.map(parse, auto, deterministic=True).prefetch(auto)
    try:
        yield from joined.as_numpy_iterator()
    except tf.errors.OpError as error:
        raise UserError(
            f"{folder}: cannot be read ({records.reason(error)}): `{records.ENCODE} "
            f"--check={folder}` names the shard and the record; copy that shard again "
            "or encode again"
        ) from error


def prefetch_to_device(
    iterator: Iterator[Mapping[str, np.ndarray]], sharding: Any, size: int = 2
) -> Generator[dict[str, jax.Array]]:
    """Batches placed on the devices ahead of time, in a thread that ends with this.

    iterator: local rows of global batches, as `batches` yields them; sharding: splits
    the leading axis of every array; size: batches that wait on the devices.

    Yields dicts of global jax.Array. Raises what `iterator` raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch_to_device")

    def place() -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in next(iterator).items()
        }

    waiting = collections.deque(pool.submit(place) for _ in range(size))
    try:
        while True:
            try:
                batch = waiting.popleft().result()
            except StopIteration:
                return
            waiting.append(pool.submit(place))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Not without end: a read may hang (network disks).
        wait([future for future in waiting if not future.cancelled()], timeout=10)
