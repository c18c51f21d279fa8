"""Batches of latents in an order that depends on the seed and the step alone.

Row r of the global batch belongs to the virtual stream r // (batch_size // streams).
Stream v owns the shards s with s % streams == v and walks them epoch by epoch, forever,
with an order of its own. A process reads the streams of its rows only, so that the
global batch is the same for every number of processes, and a resumed run continues
exactly: what a stream has consumed follows from the step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from sra2_jax.data import records
from sra2_jax.data.check import damaged
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
        missing, shards of another size than encoded or in each other's place; while
        iterating, a record that cannot be read, one of another stream, or a label
        outside [0, num_classes).
    """
    info = records.LatentsInfo.read(folder)
    shards = _shards(info, folder, split)
    check_fields(info, folder, fields)
    count = len(shards.records)
    _check_division(batch_size, streams, process_count, count, folder)
    owned, rows = streams // process_count, batch_size // streams
    paths = [records.shard_path(folder, split, s, count) for s in range(count)]
    parts: list[Any] = []
    mine: list[int] = []
    own_streams = range(process_index * owned, (process_index + 1) * owned)
    for v in own_streams:
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
        mine += range(count)[own]
    reader = _Reader(info, folder, split, mine, fields)
    reader.check_places()
    return reader.batches(
        _joined(parts, info, fields), np.repeat(own_streams, rows), streams
    )


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


class _Reader:
    """Reads what tf.data gives, and says what is wrong and where if something is.

    mine: the shards that this process reads.
    """

    def __init__(
        self,
        info: records.LatentsInfo,
        folder: Any,
        split: str,
        mine: Sequence[int],
        fields: Sequence[str],
    ) -> None:
        self._info, self._folder, self._fields = info, folder, fields
        self._split, self._shards, self._mine = split, info.splits[split], mine

    def check_places(self) -> None:
        """Refuse shards that are copies of others: they raise nothing in TensorFlow.

        A record's index says which shard it belongs to; the first one of each is read.
        """
        tf = records.tensorflow()
        filled = [s for s in self._mine if self._shards.records[s]]
        paths = tf.data.Dataset.from_tensor_slices([self._path(s) for s in filled])

        def first(path: Any) -> Any:
            record = tf.data.TFRecordDataset(path).take(1).get_single_element()
            schema = {"index": tf.io.FixedLenFeature([], tf.int64)}
            return tf.io.parse_single_example(record, schema)["index"]

        # Side by side, for disks that answer slowly.
        found = paths.map(first, num_parallel_calls=16, deterministic=True)
        with self._named():
            indices = list(found.as_numpy_iterator())
        count = len(self._shards.records)
        for shard, index in zip(filled, indices, strict=True):
            if index % count != shard:
                self._refuse_place(index, f"shard {self._name(shard)}")

    def batches(
        self, dataset: Any, owner: np.ndarray, streams: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """owner: the stream of each row of a batch."""
        count = len(self._shards.records)
        rows = dataset.as_numpy_iterator()
        while True:
            with self._named():
                batch = next(rows)
            label, index = batch["label"], batch["index"]
            wrong = np.flatnonzero((label < 0) | (label >= self._info.num_classes))
            if wrong.size:
                found = index[wrong[0]]
                raise UserError(
                    f"{self._folder}: record with index {found} in shard "
                    f"{self._name(found % count)} has label {label[wrong[0]]}, outside "
                    f"[0, {self._info.num_classes}); encode again"
                )
            strange = np.flatnonzero(index % count % streams != owner)
            if strange.size:
                row = strange[0]
                self._refuse_place(index[row], f"the shards of stream {owner[row]}")
            yield batch

    def _refuse_place(self, index: int, where: str) -> NoReturn:
        home = self._name(index % len(self._shards.records))
        raise UserError(
            f"{self._folder}: record with index {index} is in {where} and belongs in "
            f"{home}: shards were mixed up; see {records.ENCODE} --check={self._folder}"
        )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except records.tensorflow().errors.OpError as error:
            raise UserError(
                f"{self._folder}: cannot be read ({type(error).__name__}): "
                f"{self._first_damaged()}; copy it again or encode again"
            ) from error

    def _first_damaged(self) -> str:
        """Name the first unreadable shard and record; tf.data's own errors do not.

        Reads the shards once more, which only a run that has already failed pays for.
        """
        for shard in self._mine:
            path, name = self._path(shard), f"shard {self._name(shard)}"
            found, damage = damaged(path, self._info, self._fields)
            if damage:
                return f"{name}: {damage}"
            if found != self._shards.records[shard]:
                wanted = self._shards.records[shard]
                return f"{name} has {found} records, not {wanted}"
        return "all shards can be read again, and parsed"

    def _path(self, shard: int) -> str:
        count = len(self._shards.records)
        return str(records.shard_path(self._folder, self._split, shard, count))

    def _name(self, shard: int) -> str:
        return os.path.basename(self._path(shard))
