"""Batches of latents in an order that depends on the seed and the step alone.

Row r of the global batch belongs to the virtual stream r // (batch_size // streams).
Stream v owns the shards s with s % streams == v and walks them epoch by epoch, forever,
with an order of its own. A process reads the streams of its rows only, so that the
global batch is the same for every number of processes, and a resumed run continues
exactly: what a stream has consumed follows from the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sra2_jax.data import records
from sra2_jax.errors import UserError

# Files that a stream reads at once, and records taken from each in turn.
_OPEN_FILES = 4
_BLOCK = 16


def batches(
    folder: str | os.PathLike,
    *,
    split: str,
    batch_size: int,
    seed: int,
    start_step: int,
    streams: int,
    shuffle_buffer: int,
    process_index: int,
    process_count: int,
    fields: Sequence[str] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches start_step, start_step + 1, ...

    Args:
      folder: dataset of latents (see records.py), local or gs://.
      batch_size: rows of the GLOBAL batch.
      streams: number of virtual streams; part of the order, like seed, batch_size and
        shuffle_buffer, and independent of the number of processes.
      shuffle_buffer: records to shuffle among, over all streams, in the memory of all
        processes together.
      start_step: batches to skip; reads at most one epoch of raw records for it.
      fields: "image" and "features", to read them as well; they do not change the
        order.

    Returns:
      An endless iterator of `mean`, `std` (local_B, h, w, c) float16, not scaled,
      `label` (local_B,) int32, `index` (local_B,) int64, and as asked for `image`
      (local_B, R, R, 3) uint8, `features` (local_B, tokens, width) float16.

    Raises:
      UserError: at once, numbers that do not divide, a split, field or shards that are
        missing, shards of another size than encoded; while iterating, a record that
        cannot be read, or a label outside [0, num_classes).
    """
    info = records.LatentsInfo.read(folder)
    shards = _shards(info, folder, split)
    check_fields(info, folder, fields)
    count = len(shards.records)
    _check_division(batch_size, streams, process_count, count, folder)
    owned, rows = streams // process_count, batch_size // streams
    paths = [records.shard_path(folder, split, s, count) for s in range(count)]
    parts: list[Any] = []
    mine: list[tuple[Any, int]] = []
    for v in range(process_index * owned, (process_index + 1) * owned):
        own = slice(v, None, streams)
        _check_files(folder, paths[own], shards.records[own], shards.bytes[own])
        stream = _stream(
            [str(path) for path in paths[own]],
            shards.records[own],
            seed=(seed, v),
            consumed=start_step * rows,
            shuffle_buffer=-(-shuffle_buffer // streams),
        )
        parts.append(stream.batch(rows))
        mine += zip(paths[own], shards.records[own], strict=True)
    return _as_numpy(_joined(parts, info, fields), info, folder, mine)


def _shards(
    info: records.LatentsInfo, folder: str | os.PathLike, split: str
) -> records.Shards:
    if split not in info.splits:
        raise UserError(
            f"{folder}: no split {split!r}, only {sorted(info.splits)}; change the "
            "split in the config or encode that one"
        )
    return info.splits[split]


def check_fields(
    info: records.LatentsInfo, folder: str | os.PathLike, fields: Sequence[str]
) -> None:
    """Refuse a dataset whose records lack one of `fields`, see `batches`.

    Raises:
      UserError: the field, and the flag of the encoder that stores it.
    """
    stored = {"image": info.images, "features": info.features is not None}
    flags = {"image": "--store_images", "features": "--encoder=MODEL"}
    for name in fields:
        if not stored[name]:
            raise UserError(
                f"{folder}: its records hold no {name}; encode again with "
                f"{flags[name]} ({records.ENCODE})"
            )


def _check_division(
    batch_size: int, streams: int, process_count: int, shards: int, folder: Any
) -> None:
    if streams < 1 or batch_size < 1 or batch_size % streams:
        raise UserError(
            f"batch size {batch_size} is not a multiple of the {streams} data streams; "
            "change one of them"
        )
    if streams % process_count:
        raise UserError(
            f"{streams} data streams do not divide among {process_count} processes; "
            "use a multiple of the number of processes"
        )
    if streams > shards:
        raise UserError(
            f"{folder}: {streams} data streams need as many shards, it has {shards}; "
            f"use at most {shards} streams or encode again with --shards={streams}"
        )


def _check_files(
    folder: Any, paths: Sequence[Any], counts: Sequence[int], sizes: Sequence[int]
) -> None:
    """Empty streams and missing, cut or grown shards, found before the first step."""
    if not sum(counts):
        raise UserError(
            f"{folder}: no records in shard {paths[0].name} and the others of its "
            "stream; use fewer data streams"
        )
    for path, size in zip(paths, sizes, strict=True):
        found = path.stat().length if path.exists() else 0
        if found != size:
            raise UserError(
                f"{folder}: shard {path.name} has {found or 'no'} bytes, {size} when "
                "it was encoded; copy it again or encode again"
            )


def _stream(
    paths: Sequence[str],
    counts: Sequence[int],
    *,
    seed: tuple[int, int],
    consumed: int,
    shuffle_buffer: int,
) -> Any:
    """The endless tf.data stream of raw records, from record `consumed` on."""
    tf = records.tensorflow()
    total = sum(counts)
    first, offset = divmod(consumed, total)
    # 63 bits of (seed, stream) by a hash that numpy promises to keep stable.
    key = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)

    def shard(path: Any, count: Any) -> Any:
        # A shard cut between two records is no error to TensorFlow otherwise.
        return tf.data.TFRecordDataset(path).apply(
            tf.data.experimental.assert_cardinality(count)
        )

    def epoch(number: Any) -> Any:
        draws = tf.random.stateless_uniform(
            [len(paths) + 1],
            seed=tf.stack([tf.constant(key, tf.int64), number]),
            minval=None,
            maxval=None,
            dtype=tf.int64,
            alg="philox",
        )
        order = tf.argsort(draws[1:], stable=True)
        files = tf.data.Dataset.from_tensor_slices(
            (
                tf.gather(tf.constant(paths), order),
                tf.gather(tf.constant(counts, tf.int64), order),
            )
        )
        return (
            files.interleave(shard, cycle_length=_OPEN_FILES, block_length=_BLOCK)
            .shuffle(
                min(shuffle_buffer, total),
                seed=draws[0],
                reshuffle_each_iteration=False,
            )
            # Raw records: ten times cheaper to skip than parsed ones.
            .skip(tf.where(number == first, tf.constant(offset, tf.int64), 0))
        )

    return tf.data.Dataset.range(first, np.iinfo(np.int64).max).flat_map(epoch)


def _joined(
    parts: Sequence[Any], info: records.LatentsInfo, fields: Sequence[str]
) -> Any:
    """One batch of each stream, parsed and concatenated."""
    tf = records.tensorflow()

    def parse(*serialized: Any) -> dict[str, Any]:
        # Parsed first: concatenating strings copies them one by one, 1.3 times slower.
        parsed = [records.parse(rows, info, fields) for rows in serialized]
        return {key: tf.concat([rows[key] for rows in parsed], 0) for key in parsed[0]}

    options = tf.data.Options()
    options.deterministic = True
    return (
        tf.data.Dataset.zip(tuple(part.prefetch(tf.data.AUTOTUNE) for part in parts))
        .map(parse, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )


def _as_numpy(
    dataset: Any,
    info: records.LatentsInfo,
    folder: Any,
    shards: Sequence[tuple[Any, int]],
) -> Iterator[dict[str, np.ndarray]]:
    tf = records.tensorflow()
    rows = dataset.as_numpy_iterator()
    while True:
        try:
            batch = next(rows)
        except tf.errors.OpError as error:
            raise UserError(
                f"{folder}: cannot be read ({type(error).__name__}): "
                f"{_first_damaged(shards)}; copy it again or encode again"
            ) from error
        label = batch["label"]
        wrong = np.flatnonzero((label < 0) | (label >= info.num_classes))
        if wrong.size:
            raise UserError(
                f"{folder}: record with index {batch['index'][wrong[0]]} has label "
                f"{label[wrong[0]]}, outside [0, {info.num_classes}); encode again"
            )
        yield batch


def _first_damaged(shards: Sequence[tuple[Any, int]]) -> str:
    """Name the first unreadable shard; tf.data's own errors do not.

    Reads the shards once more, which only a run that has already failed pays for.
    """
    tf = records.tensorflow()
    for path, count in shards:
        found = 0
        try:
            for rows in tf.data.TFRecordDataset(str(path)).batch(1024):
                found += len(rows)
        except tf.errors.OpError:
            return f"shard {path.name} is damaged"
        if found != count:
            return f"shard {path.name} has {found} records, not {count}"
    return "all shards can be read, but not parsed with this schema"
