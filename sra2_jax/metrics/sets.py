"""Sets of images that metrics are taken of: folders and datasets, read in threads."""

from __future__ import annotations

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sra2_jax.data import images as sources
from sra2_jax.errors import UserError

DIGITS_SIDE = 32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, not in memory.

    Attributes:
      name: as given, for messages; count, shape (H, W, 3).
      labels: (count,) integers, where the set has them.
      settings: what made them, where the file says so.
      batches: batch size -> uint8 (n, H, W, 3), in order; the last one may be shorter.
    """

    name: str
    count: int
    shape: Shape
    labels: np.ndarray | None
    settings: dict[str, Any] | None
    batches: Callable[[int], Iterator[np.ndarray]]


def open_folder(folder: Path, resolution: int | None) -> ImageSet:
    """Every image below a folder, in the order of their paths.

    resolution: centre-crop each to this side, as ADM does.

    Raises:
      UserError: no images. Its batches raise it for images that cannot be decoded, or
        of mixed sizes.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder of images; give an .npz, a folder, "
            "tfds:NAME[:SPLIT] or digits"
        )
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(sources.SUFFIXES)
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise UserError(f"{folder}: no images ({', '.join(sources.SUFFIXES)}) in it")

    def load(path: Path) -> np.ndarray:
        try:
            image = sources.decode_rgb(path)
        except Exception as error:  # Pillow raises nearly anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: cannot be decoded ({type(error).__name__}: {reason}): mend "
                "or remove it"
            ) from error
        return image if resolution is None else sources.center_crop(image, resolution)

    shape = load(paths[0]).shape

    def images() -> Iterator[np.ndarray]:
        for path, image in zip(paths, _in_threads(load, paths), strict=True):
            if image.shape != shape:
                raise UserError(
                    f"{folder}: images of mixed sizes, {paths[0].relative_to(folder)} "
                    f"has {shape[1]}x{shape[0]} pixels, {path.relative_to(folder)} "
                    f"{image.shape[1]}x{image.shape[0]}: --resolution=N crops all to "
                    "one size"
                )
            yield image

    batches = functools.partial(_stacked, images)
    return ImageSet(str(folder), len(paths), shape, None, None, batches)


def _stacked(
    images: Callable[[], Iterator[np.ndarray]], size: int
) -> Iterator[np.ndarray]:
    """`size` images at a time."""
    waiting = images()
    while parts := list(itertools.islice(waiting, size)):
        yield np.stack(parts)


def _in_threads(load: Callable[[Path], Any], paths: Iterable[Path]) -> Iterator[Any]:
    """load(path) of each, in order, a bounded number ahead."""
    threads = min(16, os.cpu_count() or 1)
    waiting: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for path in paths:
            waiting.append(pool.submit(load, path))
            if len(waiting) > 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def open_dataset(spec: str, resolution: int | None, split: str) -> ImageSet:
    """`tfds:NAME[:SPLIT]` or `digits`, cropped to `resolution`.

    Raises:
      UserError: no such dataset, or no resolution for it.
    """
    if spec == "digits":
        resolution = resolution or DIGITS_SIDE
    if resolution is None:
        raise UserError(f"{spec}: images of many sizes: give --resolution")
    source = sources.open_source(spec, split)
    labels = None
    if spec == "digits":
        labels = np.array([entry.label for entry in source.entries()])

    def images() -> Iterator[np.ndarray]:
        for _, name, image, _ in sources.read(source, resolution):
            if isinstance(image, Exception):
                raise UserError(f"{spec}: {name} cannot be decoded ({image})")
            yield image

    batches = functools.partial(_stacked, images)
    shape = (resolution, resolution, 3)
    return ImageSet(spec, source.length, shape, labels, None, batches)
