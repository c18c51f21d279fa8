"""Sources of labelled images, and the centre crop of ADM.

A source is a folder with one sub-folder per class, any TFDS image-classification
dataset (`tfds:NAME[:SPLIT]`), or one that is BUILT_IN. It only lists its images; `read`
decodes and crops them in threads (Pillow releases the GIL).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from sra2_jax.data import records
from sra2_jax.data.pixels import center_crop, decode_rgb
from sra2_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image not decoded yet; `load()` gives uint8 (H, W, 3) or raises."""

    index: int
    name: str
    label: int
    load: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A listing of `length` images in a fixed order.

    entries: (stride=1, offsets=(0,)) -> those at a position % stride in offsets.
    fingerprint: changes with names, labels and order.
    at_once: shards to write in one pass over `entries`, more than 1 where it reads
      past what it leaves out.
    """

    name: str
    length: int
    num_classes: int
    class_names: tuple[str, ...]
    entries: Callable[..., Iterator[Entry]]
    fingerprint: str
    at_once: int = 1


def open_source(spec: str | os.PathLike, split: str) -> ImageSource:
    """List the images of a source, see SPECS.

    split: to read of a source that has splits, unless `spec` names one.

    Raises:
      UserError: an unknown source, or one without images.
    """
    spec = os.fspath(spec)
    if spec in BUILT_IN:
        return BUILT_IN[spec](spec, split)
    if spec.startswith("tfds:"):
        name, _, own_split = spec.removeprefix("tfds:").partition(":")
        return _tfds(name, own_split or split)
    return _folder(Path(spec))


def _indexed(
    length: int, entry: Callable[[int], Entry]
) -> Callable[..., Iterator[Entry]]:
    """The entries of a listing that any image can be had of."""

    def entries(stride: int = 1, offsets: Sequence[int] = (0,)) -> Iterator[Entry]:
        return (entry(i) for i in range(length) if i % stride in offsets)

    return entries


def _folder(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images; give a {SPECS}")
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

    def entry(index: int) -> Entry:
        label, name = files[index]
        relative = f"{classes[label]}/{name}"
        load = functools.partial(decode_rgb, folder / relative)
        return Entry(index, relative, label, load)

    listing = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
    for label, name in files:
        listing.update(f"\n{label}/{name}".encode("utf-8", "surrogateescape"))
    entries, names = _indexed(len(files), entry), tuple(classes)
    return ImageSource(
        str(folder), len(files), len(names), names, entries, listing.hexdigest()
    )


def _digits(name: str, split: str) -> ImageSource:
    from sra2_jax.data.digits import load_digits  # scikit-learn takes a second

    images, labels = load_digits(split)

    def entry(index: int) -> Entry:
        load = functools.partial(np.asarray, images[index])
        return Entry(index, f"{name}/{split}/{index}", int(labels[index]), load)

    count, classes = len(images), tuple("0123456789")
    entries = _indexed(count, entry)
    return ImageSource(name, count, 10, classes, entries, f"{name}/{split}")


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
        f"tfds:{name}",
        length,
        label.num_classes,
        tuple(label.names or ()),
        entries,
        f"{builder.info.full_name}:{split}",
        at_once=16,
    )


def _decode_bytes(data: bytes) -> np.ndarray:
    return decode_rgb(io.BytesIO(data))


# Images that come with the package, by the name that stands for them.
BUILT_IN = {"digits": _digits}
SPECS = (
    f"folder with one sub-folder per class, tfds:NAME[:SPLIT], {', '.join(BUILT_IN)}"
)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in order, a bounded number ahead."""
    threads = min(16, os.cpu_count() or 1)
    waiting: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            # Enough to keep every thread busy, few enough to bound the memory.
            if len(waiting) > 8 * threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


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

    for entry, image in in_threads(work, source.entries(stride, offsets)):
        yield entry.index, entry.name, image, entry.label


def readable(
    source: ImageSource,
    size: int,
    max_bad: float,
    skip: Callable[[int, str], int],
    *,
    stride: int = 1,
    offsets: Sequence[int] = (0,),
    mirror_offset: int = 0,
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(index, image, label) of the images that decode, as `read` gives them.

    Args:
      max_bad: share of all images that may be unreadable.
      skip: gets the index of each of those and its line of the report, and says how
        many of the source there are by now.
      mirror_offset: if not 0, each image comes again, mirrored left to right, its index
        this much larger.

    Raises:
      UserError: too many are unreadable, or a label is no class.
    """
    for index, name, image, label in read(source, size, stride, offsets):
        if not 0 <= label < source.num_classes:
            raise UserError(
                f"{source.name}: {name} has no valid label ({label}); choose a split "
                f"with labels in [0, {source.num_classes})"
            )
        if not isinstance(image, Exception):
            yield index, image, label
            if mirror_offset:
                yield index + mirror_offset, image[:, ::-1], label
            continue
        reason = _one_line(image)
        bad = skip(index, f"{name}\t{reason}")
        # At once, not at the end: the rest of a large source would be encoded in vain.
        if bad > max_bad * source.length:
            raise UserError(
                f"{source.name}: {bad} images so far cannot be decoded, more than "
                f"--max_bad={max_bad} of all {source.length} ({name}: {reason}); mend "
                "them or raise --max_bad"
            )


def _one_line(error: Exception) -> str:
    # Without addresses of objects, which differ from run to run.
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"
