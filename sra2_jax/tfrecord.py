"""TFRecord files of tf.train.Example records, without TensorFlow.

A record in a file is its length (8 bytes), a checksum of that, its bytes, a checksum of
them; checksums are masked CRC-32C. An Example is a protobuf of named values.
Source: TensorFlow's `record_writer.cc` and `example.proto`.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from etils import epath

from sra2_jax.storage import is_remote, patiently

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_THREAD = threading.local()


class Damaged(Exception):
    """A record that no writer wrote: its shard and number, and what is wrong with it.

    path: of the shard's file.
    """

    def __init__(self, row: tuple[Shard, int], reason: str) -> None:
        shard, number = row
        super().__init__(f"record {number} {reason}")
        self.path = shard.path


def _masked(data: Any) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """A record as it lies in a file."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, _CRC.pack(_masked(length)), data, _CRC.pack(_masked(data)))
    )


class Shard:
    """The records of a file, by number. A local file is read when a record is asked
    for, a remote one is read whole at once. Lengths of all records are read first.

    Raises OSError: it cannot be read; Damaged.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path, self._remote, self._file = path, b"", -1
        if is_remote(path):
            self._remote = patiently(path.read_bytes)
        else:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            if hasattr(os, "posix_fadvise"):  # all of it will be read
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_WILLNEED)
        self._starts = self._scan()

    def _scan(self) -> array[int]:
        local = self._file >= 0
        end = os.fstat(self._file).st_size if local else len(self._remote)
        start, starts = 0, array("q", [0])
        while start < end:
            header = self._remote[start : start + 12]
            if local:
                header = os.pread(self._file, 12, start)
            length, crc = _HEADER.unpack(header.ljust(12, b"\0"))
            start += 16 + length
            if _masked(header[:8]) != crc or start > end:
                reason = "is cut off, or its length is damaged"
                raise Damaged((self, len(starts) - 1), reason)
            starts.append(start)
        return starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def size(self, number: int) -> int:
        """Bytes of a record, and 4 of its checksum."""
        return self._starts[number + 1] - self._starts[number] - 12

    def read(self, number: int, into: Any) -> None:
        """Read a record and its checksum into uint8 (size,)."""
        start, count = self._starts[number] + 12, len(into)
        if self._file >= 0:
            count = os.preadv(self._file, [into], start)
        else:
            into[:] = np.frombuffer(self._remote, np.uint8, count, start)
        if count < len(into) or _CRC.unpack(into[-4:])[0] != _masked(into[:-4]):
            raise Damaged((self, number), "has another checksum")


def varint(value: int) -> bytes:
    """An integer of a protobuf."""
    out = bytearray()
    value &= 2**64 - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def field(number: int, data: bytes) -> bytes:
    """A field of a protobuf that holds a text or a message."""
    return bytes((number << 3 | 2,)) + varint(len(data)) + data


def serialize(values: Mapping[str, bytes | int]) -> bytes:
    """An Example of one text or integer a name, in the order of the names."""
    entries = b""
    for name, value in sorted(values.items()):
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            feature = field(3, field(1, varint(value)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def _message(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(field, start, stop) of the bytes of each field of a message."""
    while start < stop:
        tag, length, shift, start = data[start], 0, 0, start + 1
        while True:
            byte, start = data[start], start + 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        # All fields of an Example are messages, texts or packed numbers.
        if tag & 7 != 2 or start + length > stop:
            raise ValueError
        yield tag >> 3, start, start + length
        start += length


def _spans(data: bytes) -> dict[str, tuple[int, int]]:
    """Where the value of each name lies: a text, or the varint of an integer.

    Raises ValueError or IndexError: no Example of single values."""
    found = {}
    for _, *features in _message(data, 0, len(data)):
        for _, *entry in _message(data, *features):
            (_, *name), (_, *feature) = _message(data, *entry)
            ((_, *values),) = _message(data, *feature)
            ((_, start, stop),) = _message(data, *values)
            found[data[slice(*name)].decode()] = start, stop
    return found


def read(
    rows: Sequence[tuple[Shard, int]], names: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Values of records, each a shard and a number in it, in groups: which rows they
    are, {name: uint8 (len(which), bytes)}, good until the next group.

    Records that are alike but for their values are cut as one array: a batch in a few
    operations. Raises Damaged: a record that cannot be read, is no Example, or lacks a
    name.
    """
    sizes = np.array([shard.size(number) for shard, number in rows])
    order = np.argsort(sizes, kind="stable")
    buffer = _buffer(len(rows), int(sizes.max()))
    for place, i in enumerate(order.tolist()):
        shard, number = rows[i]
        try:
            shard.read(number, buffer[place, : sizes[i]])
        except OSError as error:
            raise Damaged(rows[i], f"cannot be read: {error}") from error
    stops = np.flatnonzero(np.diff(sizes[order], append=-1)) + 1
    for start, stop in itertools.pairwise([0, *stops.tolist()]):
        which = order[start:stop]
        examples = buffer[start:stop, : sizes[which[0]] - 4]
        while len(which):
            try:
                spans = _spans(examples[0].tobytes())
            except (IndexError, ValueError):
                what = "is no tf.train.Example of single values"
                raise Damaged(rows[which[0]], what) from None
            if missing := [name for name in names if name not in spans]:
                raise Damaged(rows[which[0]], f"has no {missing[0]}")
            between = np.ones(examples.shape[1], bool)
            for span in spans.values():
                between[slice(*span)] = False
            frames = examples[:, between]
            alike = (frames == frames[0]).all(1)
            group = examples if alike.all() else examples[alike]
            yield which[alike], {name: group[:, slice(*spans[name])] for name in names}
            which, examples = which[~alike], examples[~alike]


def _buffer(count: int, size: int) -> np.ndarray:
    """uint8 (count or more, size or more), of this thread: fresh memory would take
    longer than all else."""
    found = getattr(_THREAD, "buffer", np.empty((0, 0), np.uint8))
    if len(found) < count or found.shape[1] < size:
        _THREAD.buffer = found = np.empty((count, size), np.uint8)
    return found


def integers(varints: np.ndarray) -> np.ndarray:
    """uint8 (N, bytes), varints of one size -> int64 (N,)."""
    shifts = 7 * np.arange(varints.shape[1], dtype=np.uint64)
    parts = (varints & 127).astype(np.uint64) << shifts
    return parts.sum(axis=1, dtype=np.uint64).view(np.int64)  # of other bits each
