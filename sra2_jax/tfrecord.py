"""TFRecord files of tf.train.Example records, without TensorFlow.

A record in a file is its length (8 bytes), a checksum of that, its bytes, a checksum of
them; checksums are masked CRC-32C. An Example is a protobuf of named values.
Source: TensorFlow's `record_writer.cc` and `example.proto`.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from etils import epath

from sra2_jax.run import patiently

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_NO_EXAMPLE = "is no tf.train.Example of single values"


class Damaged(Exception):
    """A record that no writer wrote: its number, and what is wrong with it."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"record {number} {reason}")
        self.number, self.reason = number, reason


def _masked(data: bytes) -> int:
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
    for, a remote one is read whole at once.

    Raises OSError: it cannot be read; Damaged.
    """

    def __init__(self, path: epath.Path) -> None:
        self._read: Callable[[int, int], bytes]  # size, position
        if "://" in str(path):
            data = patiently(path.read_bytes)
            size = len(data)
            self._read = lambda size, start: data[start : start + size]
        else:
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            size = os.fstat(file).st_size
            if hasattr(os, "posix_fadvise"):  # read ahead, all of it
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            self._read = lambda size, start: os.pread(file, size, start)
        self._starts = [0]
        while (start := self._starts[-1]) < size:
            header = self._read(12, start)
            length, crc = _HEADER.unpack(header.ljust(12, b"\0"))
            if _masked(header[:8]) != crc or start + 16 + length > size:
                raise Damaged(len(self), "is cut off, or its length is damaged")
            self._starts.append(start + 16 + length)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> bytes:
        if number >= len(self):
            raise Damaged(number, "is missing")
        start, stop = self._starts[number : number + 2]
        data = self._read(stop - start - 12, start + 12)
        record, crc = data[:-4], data[-4:]
        if len(data) < stop - start - 12 or _CRC.unpack(crc)[0] != _masked(record):
            raise Damaged(number, "has another checksum")
        return record


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


def _message(data: Any, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
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


def _spans(data: Any) -> dict[str, tuple[int, int]]:
    """Where the value of each name lies: a text, or the varint of an integer.

    Raises ValueError or IndexError: no Example of single values."""
    found = {}
    for _, *features in _message(data, 0, len(data)):
        for _, *entry in _message(data, *features):
            (_, *name), (_, *feature) = _message(data, *entry)
            ((_, *values),) = _message(data, *feature)
            ((_, start, stop),) = _message(data, *values)
            found[bytes(data[slice(*name)]).decode()] = start, stop
    return found


def parse(
    examples: Sequence[bytes], names: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Values of Examples in groups: which they are, {name: uint8 (len(which), bytes)}.

    Those that are alike but for their values are cut as one array: a batch in a few
    operations. Raises Damaged: no Example, or a name that it lacks.
    """
    sizes: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        sizes.setdefault(len(example), []).append(i)
    left = [np.array(group) for group in sizes.values()]
    while left:
        which = left.pop()
        joined = np.frombuffer(b"".join([examples[i] for i in which]), np.uint8)
        rows = joined.reshape(len(which), -1)
        try:
            spans = _spans(examples[which[0]])
        except (IndexError, ValueError):
            raise Damaged(which[0], _NO_EXAMPLE) from None
        if missing := [name for name in names if name not in spans]:
            raise Damaged(which[0], f"has no {missing[0]}")
        between = np.ones(rows.shape[1], bool)
        for start, stop in spans.values():
            between[start:stop] = False
        frames = rows[:, between]
        alike = (frames == frames[0]).all(1)
        if not alike.all():
            left.append(which[~alike])
            rows, which = rows[alike], which[alike]
        yield which, {name: rows[:, slice(*spans[name])] for name in names}


def integers(varints: np.ndarray) -> np.ndarray:
    """uint8 (N, bytes), varints of one size -> int64 (N,)."""
    shifts = 7 * np.arange(varints.shape[1], dtype=np.uint64)
    parts = (varints & 127).astype(np.uint64) << shifts
    return np.bitwise_or.reduce(parts, axis=1).view(np.int64)
