"""Sets of images and ADM's .npz files of them, read and written batch by batch.

A set may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from sra2_jax.data import images as sources
from sra2_jax.errors import UserError
from sra2_jax.metrics.moments import Gaussian, check_gaussian

IMAGES, LABELS, SETTINGS = "arr_0", "arr_1", "settings"
# kind of features -> members with their mean and covariance
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
DIGITS_SIDE = 32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, not in memory, or statistics of them, or both.

    Attributes:
      name: as given, for messages.
      shape: (N, H, W, 3); N = 0 where there are statistics alone.
      batches: batch size -> uint8 (n, H, W, 3), in order; the last one may be shorter.
      labels: (N,) integers, where the set has them.
      settings: what made them, where the file says so.
      gaussians: "pool" and "spatial" -> mean and covariance, as far as known; the
        images may then be some of those that they are of.
    """

    name: str
    shape: Shape
    batches: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None = None
    settings: dict[str, Any] | None = None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.shape[0]


def open_images(
    spec: str, resolution: int | None = None, split: str = "train"
) -> ImageSet:
    """Open a set of images without reading it whole.

    Args:
      spec: an .npz in ADM's format: uint8 NHWC images as arr_0 (sample files), mu and
        sigma, mu_s and sigma_s (reference files), or both, and perhaps labels as arr_1
        and settings (a JSON text); a folder with images at any depth, in the order of
        their paths; tfds:NAME[:SPLIT]; or digits.
      resolution: side to which folders and datasets are cropped by ADM's rule. Datasets
        need it, folders unless all their images are squares of one size.
      split: of a dataset, where `spec` names none.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"resolution is {resolution}: give pixels, at least 1")
    if epath.Path(spec).is_dir():
        return _source_images(spec, *_folder(Path(spec), resolution))
    if spec == "digits":
        source = sources.open_source(spec, split)
        images = _source_images(spec, source, resolution or DIGITS_SIDE)
        labels = np.array([entry.label for entry in source.entries()])
        return replace(images, labels=labels)
    if not spec.startswith("tfds:"):
        return _npz_images(spec)
    if resolution is None:
        raise UserError(f"{spec}: images of many sizes: give --resolution")
    return _source_images(spec, sources.open_source(spec, split), resolution)


# Folders and datasets


def _source_images(spec: str, source: sources.ImageSource, side: int) -> ImageSet:
    def batches(size: int) -> Iterator[np.ndarray]:
        images = map(whole, sources.read(source, side))
        while parts := list(itertools.islice(images, size)):
            yield np.stack(parts)

    def whole(row: tuple[int, str, np.ndarray | Exception, int]) -> np.ndarray:
        _, name, image, _ = row
        if isinstance(image, Exception):
            raise UserError(f"{spec}: {name} cannot be used ({_reason(image)})")
        return image

    return ImageSet(spec, (source.length, side, side, 3), batches)


def _folder(folder: Path, resolution: int | None) -> tuple[sources.ImageSource, int]:
    """Every image below a folder but for hidden ones, in the order of their paths, and
    the side that they are cropped to, or all have."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(sources.SUFFIXES)
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise UserError(f"{folder}: no images ({', '.join(sources.SUFFIXES)}) in it")
    try:
        side = resolution or len(sources.decode_rgb(paths[0]))
    except Exception as error:  # Pillow raises nearly anything
        raise UserError(f"{paths[0]} cannot be used ({_reason(error)})") from error

    def load(path: Path) -> np.ndarray:
        image = sources.decode_rgb(path)
        if resolution is None and image.shape != (side, side, 3):
            height, width = image.shape[:2]
            raise ValueError(
                f"{width}x{height} pixels, not {side}x{side}: --resolution=N crops all"
            )
        return image

    def entries(
        stride: int = 1, offsets: Sequence[int] = (0,)
    ) -> Iterator[sources.Entry]:
        for i, path in enumerate(paths):
            name = str(path.relative_to(folder))
            yield sources.Entry(i, name, 0, functools.partial(load, path))

    name = str(folder)
    return sources.ImageSource(name, len(paths), 1, ("",), entries, ""), side


# .npz files


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _opened(spec: str) -> Iterator[zipfile.ZipFile]:
    """An .npz to read; whatever is found wrong while it is open becomes a UserError."""
    try:
        with epath.Path(spec).open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise UserError(
            f"{spec}: no whole .npz in ADM's format ({_reason(error)}): give one, a "
            "folder of images, tfds:NAME[:SPLIT] or digits"
        ) from error


def _has(archive: zipfile.ZipFile, key: str) -> bool:
    return f"{key}.npy" in archive.namelist()


def _array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _image_shape(member: IO[bytes]) -> Shape:
    """The shape (N, H, W, 3) of an array of images; leaves `member` at the data."""
    np.lib.format.read_magic(member)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        order = "Fortran" if fortran else "C"
        raise ValueError(
            f"{IMAGES} is {dtype} {shape} in {order} order, not uint8 (N, H, W, 3) in C"
        )
    return shape


def _npz_images(spec: str) -> ImageSet:
    shape: Shape = (0,)
    labels = None
    with _opened(spec) as archive:
        gaussians = {
            kind: _gaussian(archive, *pair)
            for kind, pair in STATISTICS.items()
            if any(_has(archive, key) for key in pair)
        }
        # A file with neither is told that it lacks images.
        if _has(archive, IMAGES) or not gaussians:
            with archive.open(f"{IMAGES}.npy") as member:
                shape = _image_shape(member)
        if len(shape) == 4 and _has(archive, LABELS):
            labels = _array(archive, LABELS)
            if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
                raise ValueError(
                    f"{LABELS} is {labels.dtype} {labels.shape}, not an integer for "
                    f"each of {shape[0]} images"
                )
        settings = _settings(archive)

    def batches(size: int) -> Iterator[np.ndarray]:
        with _opened(spec) as archive, archive.open(f"{IMAGES}.npy") as member:
            if _image_shape(member) != shape:
                raise ValueError("it changed since it was opened")
            for start in range(0, shape[0], size):
                part = (min(size, shape[0] - start), *shape[1:])
                data = member.read(math.prod(part))
                yield np.frombuffer(data, np.uint8).reshape(part)

    return ImageSet(spec, shape, batches, labels, settings, gaussians)


def _settings(archive: zipfile.ZipFile) -> dict[str, Any] | None:
    """The JSON object in a text; None if there is none: nothing depends on it."""
    with contextlib.suppress(KeyError, ValueError):
        settings = json.loads(str(_array(archive, SETTINGS)))
        return settings if isinstance(settings, dict) else None
    return None


def _gaussian(archive: zipfile.ZipFile, *pair: str) -> Gaussian:
    """A mean and its covariance, float64, checked."""
    arrays = (_array(archive, key) for key in pair)
    # refuses what is complex or no number
    mean, cov = (array.astype(np.float64, casting="same_kind") for array in arrays)
    check_gaussian(mean, cov)
    return mean, cov


def write_npz(
    path: epath.PathLike,
    arrays: Mapping[str, np.ndarray],
    images: Iterable[np.ndarray] = (),
    shape: Shape = (),
) -> None:
    """Write an .npz that np.load, and so ADM's evaluator, opens; never half of one.

    Args:
      path: replaced if it exists; its folder is made.
      arrays: name -> array, written whole.
      images: batches of uint8 (n, H, W, 3) to write one after the other as arr_0.
      shape: (N, H, W, 3) of all images together, () where there are none.

    Raises:
      ValueError: the images are not of that shape, or not N.
    """
    target = epath.Path(path)
    fresh = target.parent / f"{target.name}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with fresh.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            # Without force_zip64 members beyond 2 GB, of a size that is not known yet,
            # would fail.
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            if shape:
                with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
                    _write_images(member, images, shape)
        fresh.replace(target)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _write_images(
    member: IO[bytes], images: Iterable[np.ndarray], shape: Shape
) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    seen = 0
    for batch in images:
        if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
            raise ValueError(f"{batch.dtype} {batch.shape} came, not uint8 {shape}")
        member.write(np.ascontiguousarray(batch).data)
        seen += len(batch)
    if seen != shape[0]:
        raise ValueError(f"{seen} images came, not {shape[0]}")
