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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from sra2_jax.config import DIGITS
from sra2_jax.data import digits
from sra2_jax.data import images as sources
from sra2_jax.data.pixels import center_crop, decode_rgb
from sra2_jax.errors import UserError, explained
from sra2_jax.metrics.moments import Gaussian, check_gaussian
from sra2_jax.storage import whole_file

IMAGES, LABELS, SETTINGS = "arr_0", "arr_1", "settings"
# kind of features -> members with their mean and covariance
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, not in memory, or statistics of them, or both."""

    name: str  # as given, for messages
    shape: Shape  # (N, H, W, 3); N = 0 where there are statistics alone
    # batch size -> uint8 (n, H, W, 3), in order; the last one may be shorter
    batches: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None = None  # (N,)
    settings: dict[str, Any] | None = None  # what made them, where the file says so
    # "pool" and "spatial" -> mean and covariance; the images may be some of theirs
    gaussians: dict[str, Gaussian] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.shape[0]


def open_images(
    spec: str, resolution: int | None = None, split: str = "train"
) -> ImageSet:
    """Open a set of images without reading it whole.

    spec: an .npz in ADM's format: uint8 NHWC images as arr_0 (sample files), mu and
    sigma, mu_s and sigma_s (reference files), or both, and perhaps labels as arr_1 and
    settings (a JSON text); a folder with images at any depth, in the order of their
    paths; tfds:NAME[:SPLIT]; mnist or digits. resolution: side to which folders and
    datasets are cropped by ADM's rule; folders of equal squares need none. split: of a
    dataset, where `spec` names none.

    Raises UserError: nothing there, or nothing that can be used.
    """
    if Path(spec).is_dir():
        return _folder(Path(spec), resolution)
    if spec in DIGITS:
        entries = sources.open_source(spec, split).entries
        labels = np.array([entry.label for entry in entries()])
        return _decoded(spec, entries, len(labels), resolution or digits.SIDE, labels)
    if not spec.startswith("tfds:"):
        return _npz_images(spec)
    if resolution is None:
        raise UserError(f"{spec}: images of many sizes: give --resolution")
    source = sources.open_source(spec, split, labelled=False)
    return _decoded(spec, source.entries, source.length, resolution)


# Folders and datasets


def _decoded(
    spec: str,
    entries: Callable[[], Iterable[sources.Entry]],
    count: int,
    resolution: int | None,
    labels: np.ndarray | None = None,
) -> ImageSet:
    """A set of `count` entries; without a resolution all are of the first one's."""

    def load(entry: sources.Entry) -> np.ndarray:
        with explained(f"{spec}: {entry.name} cannot be used"):
            image = entry.load()
            return center_crop(image, resolution) if resolution else image

    side = resolution or len(load(next(iter(entries()))))

    def batches(size: int) -> Iterator[np.ndarray]:
        images = (image for _, image in sources.in_threads(load, entries()))
        while part := list(itertools.islice(images, size)):
            if {image.shape for image in part} != {(side, side, 3)}:
                raise UserError(
                    f"{spec}: not all images have {side}x{side} pixels: --resolution=N "
                    "crops all"
                )
            yield np.stack(part)

    return ImageSet(spec, (count, side, side, 3), batches, labels)


def _folder(folder: Path, resolution: int | None) -> ImageSet:
    """Every image below a folder but for hidden ones, in the order of their paths."""
    names, _ = sources.list_images(folder)
    if not names:
        raise UserError(f"{folder}: no images ({', '.join(sources.SUFFIXES)}) in it")

    def entries() -> Iterator[sources.Entry]:
        for i, name in enumerate(names):
            load = functools.partial(decode_rgb, folder / name)
            yield sources.Entry(i, str(name), 0, load)

    return _decoded(str(folder), entries, len(names), resolution)


# .npz files


@contextlib.contextmanager
def _opened(spec: str) -> Iterator[Any]:
    """An .npz to read; whatever is found wrong while it is open becomes a UserError."""
    advice = "give one, a folder of images, tfds:NAME[:SPLIT], mnist or digits"
    with (
        explained(f"{spec}: no whole .npz in ADM's format", advice),
        epath.Path(spec).open("rb") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        yield archive


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
    gaussians = {}
    with _opened(spec) as archive:
        for kind, pair in STATISTICS.items():
            if {*pair} & {*archive}:
                # refuses what is complex or no number
                mean, cov = (
                    archive[k].astype(float, casting="same_kind") for k in pair
                )
                check_gaussian(mean, cov)
                gaussians[kind] = mean, cov
        # A file with neither is told that it lacks images.
        if IMAGES in archive or not gaussians:
            with archive.zip.open(f"{IMAGES}.npy") as member:
                shape = _image_shape(member)
        labels, text = archive.get(LABELS), str(archive.get(SETTINGS))
    settings = None
    with contextlib.suppress(ValueError):  # nothing depends on it
        settings = json.loads(text)

    def batches(size: int) -> Iterator[np.ndarray]:
        with _opened(spec) as archive, archive.zip.open(f"{IMAGES}.npy") as member:
            _image_shape(member)
            for start in range(0, shape[0], size):
                part = (min(size, shape[0] - start), *shape[1:])
                data = member.read(math.prod(part))
                yield np.frombuffer(data, np.uint8).reshape(part)

    settings = settings if isinstance(settings, dict) else None
    return ImageSet(spec, shape, batches, labels, settings, gaussians)


def write_npz(
    path: epath.PathLike,
    arrays: Mapping[str, np.ndarray],
    images: Iterable[np.ndarray],
    shape: Shape,
) -> None:
    """Write an .npz that np.load, and so ADM's evaluator, opens; never half of one.

    images: batches of uint8 (n, H, W, 3) to write one after the other as arr_0; shape:
    (N, H, W, 3), of all together.

    Raises ValueError: the images are not of that shape, or not N.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        with zipfile.ZipFile(file, "w") as archive:

            def member(name: str) -> IO[bytes]:
                # Without force_zip64 those beyond 2 GB, of a size that is not known
                # yet, would fail.
                return archive.open(f"{name}.npy", "w", force_zip64=True)

            for name, array in arrays.items():
                with member(name) as part:
                    np.lib.format.write_array(part, array, allow_pickle=False)
            with member(IMAGES) as part:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(part, header)
                arrays_of = (np.ascontiguousarray(batch).data for batch in images)
                written = sum(map(part.write, arrays_of))
        if written != math.prod(shape):
            raise ValueError(f"{written} bytes of images came, not those of {shape}")
