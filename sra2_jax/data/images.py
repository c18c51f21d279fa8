"""Sources of labelled images.

A source only lists its images; `read` decodes and crops them in threads, for Pillow
releases the GIL.
"""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sra2_jax.config import DIGITS
from sra2_jax.data import digits
from sra2_jax.data.pixels import CROPS, decode_rgb
from sra2_jax.errors import UserError, explained
from sra2_jax.runtime import tensorflow

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
THREADS = min(16, os.cpu_count() or 1)
AHEAD = 8 * THREADS  # images: enough to keep all threads busy, bounded in memory
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """An image not decoded yet; `load()` gives uint8 (H, W, 3) or raises."""

    index: int
    name: str
    label: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class ImageSource:
    """A listing of `length` images in a fixed order.

    entries: (indices=None) -> those with these indices, or all; fingerprint: changes
    with names, labels and order; at_once: shards to write in one pass over `entries`,
    more than 1 where it reads past what it leaves out; left_out: files that are no
    images, counted by kind, for a person; captions: of an image, where it has some.
    """

    name: str
    length: int
    num_classes: int
    class_names: tuple[str, ...]
    entries: Callable[..., Iterator[Entry]]
    fingerprint: str
    at_once: int = 1
    left_out: str = ""
    captions: Callable[[int], Sequence[str]] = lambda index: ()


def open_source(
    spec: str | os.PathLike,
    split: str,
    classes: str | os.PathLike = "",
    labelled: bool = True,
) -> ImageSource:
    """List the images of a source, see SPECS.

    split: to read of a source that has splits, unless `spec` names one; classes: file
    with the names of a folder's classes, one a line, in their order; labelled: whether
    a dataset must have labels.

    Raises UserError: an unknown source, or one without images.
    """
    spec = os.fspath(spec)
    if spec in DIGITS:
        return _digits(spec, split)
    if spec.startswith("tfds:"):
        name, _, own_split = spec.removeprefix("tfds:").partition(":")
        return _tfds(name, own_split or split, labelled)
    return _folder(Path(spec), classes)


def _any_of(entry: Callable[[int], Entry], length: int) -> Callable[..., Iterator]:
    """`entries` of a source that any image can be had of."""
    return lambda indices=None: map(
        entry, range(length) if indices is None else indices
    )


def list_images(folder: Path) -> tuple[list[Path], collections.Counter[str]]:
    """The images below a folder, by paths from there, sorted; and how many files of
    which suffix are none. Hidden files and folders do not count."""
    found, others = [], collections.Counter[str]()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        below = Path(parent).relative_to(folder)
        for name in (name for name in names if name[0] != "."):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                found.append(below / name)
            else:
                others[suffix or "no suffix"] += 1
    return sorted(found), others


def _folder(folder: Path, listed: str | os.PathLike) -> ImageSource:
    """A folder of classes, each a sub-folder with images at any depth."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images; give a {SPECS}")
    images, others = list_images(folder)
    classes = sorted(
        f.name for f in os.scandir(folder) if f.is_dir() and f.name[0] != "."
    )
    if listed:
        classes = Path(listed).read_text(encoding="utf-8-sig").splitlines()
    number = {name: label for label, name in enumerate(classes)}
    files = [
        (number[path.parts[0]], path) for path in images if path.parts[0] in number
    ]
    others["images in no class"] = len(images) - len(files)
    files.sort(key=lambda file: file[0])  # the sort before stays within a class
    if not files:
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in its sub-folders; give a "
            f"{SPECS}"
        )
    if empty := sorted(number.keys() - {path.parts[0] for _, path in files}):
        raise UserError(
            f"{folder}: no images in {', '.join(empty[:5])}: each sub-folder is a "
            "class: remove those, or name the classes with --classes=FILE"
        )

    def entry(index: int) -> Entry:
        label, path = files[index]
        return Entry(index, text_of(path), label, partial(decode_rgb, folder / path))

    names = tuple(map(text_of, classes))
    listing = "\n".join(
        [*names, *(f"{label}/{text_of(path)}" for label, path in files)]
    )
    return ImageSource(
        str(folder),
        len(files),
        len(names),
        names,
        _any_of(entry, len(files)),
        hashlib.sha256(listing.encode()).hexdigest(),
        left_out=", ".join(f"{n} {kind}" for kind, n in sorted(others.items()) if n),
    )


def text_of(path: str | os.PathLike) -> str:
    """A name that any file can hold, whatever bytes it is on the disk."""
    return (
        str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def _digits(name: str, split: str) -> ImageSource:
    images, labels = digits.load_digits(split, name)

    def entry(index: int) -> Entry:
        load = partial(np.asarray, images[index])
        return Entry(index, f"{name}/{split}/{index}", int(labels[index]), load)

    count, names, listing = len(images), tuple("0123456789"), f"{name}/{split}"
    return ImageSource(name, count, 10, names, _any_of(entry, count), listing)


def _tfds(name: str, split: str, labelled: bool) -> ImageSource:
    tensorflow()
    import tensorflow_datasets as tfds

    advice = (
        "prepare it with TFDS, see its page there; TFDS_DATA_DIR says where prepared "
        "ones are"
    )
    # No such dataset, no network, no manual download, no disk: errors of any kind.
    with explained(f"tfds:{name} cannot be prepared", advice):
        builder = tfds.builder(name)
        builder.download_and_prepare()
    features = dict((builder.info.features or {}).items())
    splits = builder.info.splits
    label: Any = features.get("label")
    if (
        "image" not in features
        or (labelled and not isinstance(label, tfds.features.ClassLabel))
        or split not in splits
        or not splits[split].num_examples
    ):
        kinds = {key: type(feature).__name__ for key, feature in features.items()}
        raise UserError(
            f"tfds:{name}: needs a split {split!r} of an image and a ClassLabel label; "
            f"has the splits {sorted(splits)} of {kinds}; give tfds:{name}:SPLIT"
        )

    def entries(indices: Collection[int] | None = None) -> Iterator[Entry]:
        # The encoded bytes: Pillow decodes them in our threads, and one image that
        # cannot be decoded does not end the pass.
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        wanted = None if indices is None else set(indices)
        for index, row in enumerate(tfds.as_numpy(dataset)):
            if wanted is None or index in wanted:
                load = partial(decode_rgb, io.BytesIO(row["image"]))
                number = int(row["label"]) if labelled else 0
                yield Entry(index, f"{name}/{split}/{index}", number, load)

    return ImageSource(
        f"tfds:{name}",
        splits[split].num_examples,
        label.num_classes if labelled else 1,
        tuple(label.names or ()) if labelled else (),
        entries,
        f"{builder.info.full_name}:{split}",
        at_once=16,
    )


SPECS = "folder with one sub-folder per class, tfds:NAME[:SPLIT], mnist, digits"


def in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = THREADS,
    ahead: int = AHEAD,
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in order, a bounded number ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        jobs = ((item, pool.submit(function, item)) for item in items)
        waiting = collections.deque(itertools.islice(jobs, ahead))
        while waiting:
            item, job = waiting.popleft()
            yield item, job.result()
            waiting.extend(itertools.islice(jobs, 1))
    finally:  # a read may hang (network disks)
        pool.shutdown(wait=False, cancel_futures=True)


def read(
    source: ImageSource,
    size: int,
    indices: Collection[int] | None = None,
    crop: str = "adm",
) -> Iterator[tuple[int, str, np.ndarray | Exception, int]]:
    """Decode and crop images of a source in threads, in the order of `indices` where it
    can be read in any.

    indices: of the images, in any order; by default all.

    Yields index, name, uint8 (size, size, 3) or the exception of an image that cannot
    be decoded, label.
    """

    def work(entry: Entry) -> np.ndarray | Exception:
        try:
            return CROPS[crop][0](entry.load(), size)
        # Broken files raise nearly anything: OSError, SyntaxError, struct.error...
        except Exception as error:
            return error

    for entry, image in in_threads(work, source.entries(indices)):
        yield entry.index, entry.name, image, entry.label


def readable(
    source: ImageSource,
    size: int,
    max_bad: float,
    skip: Callable[[int, str], int],
    *,
    indices: Collection[int] | None = None,
    mirror_offset: int = 0,
    crop: str = "adm",
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(index, image, label) of the images that decode, as `read` gives them.

    max_bad: share of all images that may be unreadable; skip: gets the index of each of
    those and its line of the report, and says how many of the source there are by now;
    mirror_offset: if not 0, each image comes again, mirrored left to right, its index
    this much larger.

    Raises UserError: too many are unreadable, or a label is no class.
    """
    for index, name, image, label in read(source, size, indices, crop):
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
        # Without addresses of objects, which differ from run to run.
        text = re.sub(r" at 0x[0-9a-f]+", "", text_of(" ".join(str(image).split())))
        reason = f"{type(image).__name__}: {text}"
        bad = skip(index, f"{name}\t{reason}")
        # At once, not at the end: the rest of a large source would be encoded in vain.
        if bad > max_bad * source.length:
            raise UserError(
                f"{source.name}: {bad} images so far cannot be decoded, more than "
                f"--max_bad={max_bad} of all {source.length} ({name}: {reason}); mend "
                "them or raise --max_bad"
            )
