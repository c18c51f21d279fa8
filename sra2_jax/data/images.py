"""Sources of labelled images, and the centre crop of ADM.

A source is a folder with one sub-folder per class, any TFDS image-classification
dataset (`tfds:NAME[:SPLIT]`), or `digits`. It only lists its images; `read` decodes
and crops them in threads (Pillow releases the GIL).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sra2_jax.data import records
from sra2_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image not decoded yet; `load()` gives uint8 (H, W, 3) or raises."""

    index: int
    name: str
    label: int
    load: Callable[[], np.ndarray]


class Entries(Protocol):
    """Walks a listing in its order, or those at a position % stride in offsets."""

    def __call__(
        self, stride: int = 1, offsets: Sequence[int] = (0,)
    ) -> Iterator[Entry]: ...


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A listing of `length` images in a fixed order.

    fingerprint: changes with names, labels and order.
    at_once: shards to write in one pass over `entries`, more than 1 where it reads
      past what it leaves out.
    """

    length: int
    num_classes: int
    class_names: tuple[str, ...]
    entries: Entries
    fingerprint: str
    at_once: int = 1


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop of ADM: the square of `size` pixels that the VAE gets to see.

    Halves with BOX while the short side is at least 2 * size, resizes with BICUBIC so
    that the short side is `size`, crops the centre.

    Args:
      image: uint8 (H, W, 3).

    Returns:
      uint8 (size, size, 3).

    Source: openai/guided-diffusion `center_crop_arr`, REPA `center-crop-dhariwal`.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        halves = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halves, resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(x * scale) for x in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    x, y = (width - size) // 2, (height - size) // 2
    return np.asarray(picture)[y : y + size, x : x + size]


def decode_rgb(file: str | os.PathLike | io.BytesIO) -> np.ndarray:
    """An image file of any mode as uint8 (H, W, 3); alpha is dropped, as upstream.

    Raises:
      Exception: whatever Pillow raises for a file that it cannot decode.
    """
    with Image.open(file) as image:
        if image.mode.startswith("I;16"):
            # Pillow clips 16 bit greys at 255 instead of scaling them.
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.mode == "P" and "transparency" in image.info:
            # Pillow warns when it goes from here to RGB directly.
            return np.asarray(image.convert("RGBA").convert("RGB"))
        return np.asarray(image.convert("RGB"))


def open_source(spec: str | os.PathLike, split: str) -> ImageSource:
    """List the images of a source.

    Args:
      spec: a folder with one sub-folder per class, `tfds:NAME[:SPLIT]`, or `digits`.
      split: split to read of a source that has splits, unless `spec` names one.

    Raises:
      UserError: an unknown source, or one without images.
    """
    if spec == "digits":
        return _digits(split)
    if str(spec).startswith("tfds:"):
        name, _, own_split = str(spec).removeprefix("tfds:").partition(":")
        return _tfds(name, own_split or split)
    return _folder(Path(spec))


def _folder(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder of images; give a folder with one sub-folder "
            "per class, tfds:NAME[:SPLIT] or digits"
        )
    classes = sorted(
        f.name for f in os.scandir(folder) if f.is_dir() and f.name[0] != "."
    )
    files = [
        (label, name)
        for label, class_name in enumerate(classes)
        for name in sorted(os.listdir(folder / class_name))
        if name.lower().endswith(SUFFIXES) and name[0] != "."
    ]
    if not files:
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in its sub-folders; "
            "it must hold one sub-folder per class with the images in it"
        )

    def entries(stride: int = 1, offsets: Sequence[int] = (0,)) -> Iterator[Entry]:
        for index in positions(len(files), stride, offsets):
            label, name = files[index]
            relative = f"{classes[label]}/{name}"
            load = functools.partial(decode_rgb, folder / relative)
            yield Entry(index, relative, label, load)

    listing = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
    for label, name in files:
        listing.update(f"\n{label}/{name}".encode("utf-8", "surrogateescape"))
    return ImageSource(
        len(files), len(classes), tuple(classes), entries, listing.hexdigest()
    )


def positions(length: int, stride: int, offsets: Sequence[int]) -> Iterator[int]:
    """Those of range(length) with position % stride in offsets, in order."""
    for base in range(0, length, stride):
        for offset in sorted(offsets):
            if base + offset < length:
                yield base + offset


def _digits(split: str) -> ImageSource:
    from sra2_jax.data import digits

    if split not in ("train", "test"):
        raise UserError(f"digits: no split {split!r}; choose train or test")
    images, labels = digits.load_digits(split)

    def entries(stride: int = 1, offsets: Sequence[int] = (0,)) -> Iterator[Entry]:
        for index in positions(len(images), stride, offsets):
            load = functools.partial(np.asarray, images[index])
            name = f"digits/{split}/{index}"
            yield Entry(index, name, int(labels[index]), load)

    names = tuple("0123456789")
    return ImageSource(len(images), 10, names, entries, f"digits/{split}")


def _tfds(name: str, split: str) -> ImageSource:
    tf = records.tensorflow()
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds:{name}: TFDS has no such dataset; see `tfds.list_builders()`"
        ) from None
    builder.download_and_prepare()
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise UserError(
            f"tfds:{name}: needs the features 'image' and 'label', has "
            f"{sorted(features or ())}; choose an image-classification dataset"
        )
    if split not in builder.info.splits:
        raise UserError(
            f"tfds:{name}: no split {split!r}, only {sorted(builder.info.splits)}; "
            f"give it as tfds:{name}:SPLIT"
        )
    length = builder.info.splits[split].num_examples
    if not length:
        raise UserError(f"tfds:{name}:{split}: no images; choose another split")
    label = features["label"]

    def entries(stride: int = 1, offsets: Sequence[int] = (0,)) -> Iterator[Entry]:
        # The encoded bytes: Pillow decodes them in our threads, and one image that
        # cannot be decoded does not end the pass.
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        wanted = tf.constant(sorted(offsets), tf.int64)
        chosen = dataset.enumerate().filter(
            lambda index, _: tf.reduce_any(index % stride == wanted)
        )
        for index, row in tfds.as_numpy(chosen):
            load = functools.partial(_decode_bytes, row["image"])
            name_in = f"{name}/{split}/{index}"
            yield Entry(int(index), name_in, int(row["label"]), load)

    return ImageSource(
        length,
        label.num_classes,
        tuple(label.names or ()),
        entries,
        f"{builder.info.full_name}:{split}",
        at_once=16,
    )


def _decode_bytes(data: bytes) -> np.ndarray:
    return decode_rgb(io.BytesIO(data))


def read(
    source: ImageSource, size: int, stride: int = 1, offsets: Sequence[int] = (0,)
) -> Iterator[tuple[int, str, np.ndarray | Exception, int]]:
    """Decode and crop the images of a source, in its order, in threads.

    stride, offsets: only those at a position % stride in offsets.

    Yields:
      index, name, uint8 (size, size, 3) or the exception of an image that cannot be
      decoded, label.
    """

    def work(entry: Entry) -> np.ndarray | Exception:
        try:
            return center_crop(entry.load(), size)
        # Broken files raise nearly anything: OSError, SyntaxError, struct.error...
        except Exception as error:
            return error

    threads = min(16, os.cpu_count() or 1)
    waiting: collections.deque[tuple[Entry, Future[Any]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for entry in source.entries(stride, offsets):
            waiting.append((entry, pool.submit(work, entry)))
            # Enough to keep every thread busy, few enough to bound the memory.
            if len(waiting) > 8 * threads:
                done, future = waiting.popleft()
                yield done.index, done.name, future.result(), done.label
        for done, future in waiting:
            yield done.index, done.name, future.result(), done.label


def to_png(image: np.ndarray) -> bytes:
    """A uint8 image (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


class Readable:
    """Iterates over images that decode, and keeps account of the others.

    Args:
      name: of the source, for messages.
      max_bad: share of all images that may be unreadable.
      bad: unreadable images that are known already, elsewhere in the source.
      stride, offsets: of the images to read, see `read`.
      mirror_offset: if not 0, each image comes again, mirrored left to right, its index
        this much larger.

    Attributes:
      seen: images so far.
      unreadable: (index, line of the report) of each.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int,
        *,
        name: str | os.PathLike,
        max_bad: float,
        bad: int = 0,
        stride: int = 1,
        offsets: Sequence[int] = (0,),
        mirror_offset: int = 0,
    ) -> None:
        self._source, self._name, self._mirror = source, name, mirror_offset
        self._images = read(source, resolution, stride, offsets)
        self._max_bad, self._bad = max_bad, bad
        self.seen = 0
        self.unreadable: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        for index, name, image, label in self._images:
            self.seen += 1
            if not 0 <= label < self._source.num_classes:
                raise UserError(
                    f"{self._name}: {name} has no valid label ({label}); choose a "
                    f"split with labels in [0, {self._source.num_classes})"
                )
            if isinstance(image, Exception):
                self.unreadable.append((index, f"{name}\t{_one_line(image)}"))
                self._check()
                continue
            yield index, image, label
            if self._mirror:
                yield index + self._mirror, image[:, ::-1], label

    def _check(self) -> None:
        # At once, not at the end: the rest of a large source would be encoded in vain.
        bad, length = self._bad + len(self.unreadable), self._source.length
        if bad > self._max_bad * length:
            latest = self.unreadable[-1][1].replace("\t", ": ")
            raise UserError(
                f"{self._name}: {bad} images so far cannot be decoded, more than "
                f"--max_bad={self._max_bad} of all {length} ({latest}); mend them or "
                "raise --max_bad"
            )


def _one_line(error: Exception) -> str:
    # Without addresses of objects, which differ from run to run.
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"
