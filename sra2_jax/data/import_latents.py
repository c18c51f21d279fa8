"""Make a dataset of latents that exist: python -m sra2_jax import-latents SOURCE.

SOURCE is a folder, a file, or a hub id `owner/name[@revision]`, with

  REPA's preprocessing      dataset.json and an .npy of each image, or a .zip of them
  LightningDiT's            .safetensors with latents, labels and perhaps latents_flip
  Hugging Face datasets     as save_to_disk leaves them, .arrow or .parquet
  arrays                    an .npz, or a folder of .npy

In the last two a latent is `moments` (mean, then deviation; also `data`, as iREPA), or
`mean` and `std`, or `latents`; and `labels` or `label`. Channels are first or last.
Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sra2_jax.command import Parser
from sra2_jax.data import records
from sra2_jax.data.build import WAITING, Build, ShardWriter
from sra2_jax.data.images import in_threads
from sra2_jax.data.latents import fetch, open_latents
from sra2_jax.data.options import Options, option
from sra2_jax.errors import UserError, explained
from sra2_jax.weights import load_vae

Shape = tuple[int, int, int]
HELP = "see sra2 import-latents --help"
PASSES = 4  # over a source that is read forward: what a resumed import begins again
MADE_WITH = (
    "imported", "listing", "split", "vae", "resolution", "shards", "num_classes",
    "logvar", "channels",
)  # fmt: skip


@dataclass(frozen=True)
class ImportOptions(Options):
    """What a dataset of latents that exist is made with."""

    source: str = ""
    inside: str = option("", "folder of SOURCE that holds them")
    labels: str = option("", "file with a label a line, itself or in SOURCE")
    num_classes: int = option(0, "by default the largest label and one")
    logvar: bool = option(
        False, "moments hold the logarithm of the variance, not the deviation"
    )
    channels: str = option(
        "", "of the axes, where a shape fits both", choices=("first", "last")
    )


def import_latents(options: ImportOptions) -> records.LatentsInfo | None:
    """Import latents, see the top of this module.

    Returns the description of the dataset, None while other processes have shards to
    write.

    Raises UserError: a source that cannot be understood, latents of another shape or
    not finite in float16, something else in `out`.
    """
    vae = load_vae(options.vae)[0].config
    shape = options.latent_shape(vae)
    source, folder = fetch(options.source, options.inside, options.labels)
    beside = Path(options.labels).expanduser() if options.labels else None
    if beside and not beside.exists():
        beside = folder / options.labels
    with explained(f"{source}: cannot be imported", HELP):
        latents = open_latents(folder / options.inside, options.split, beside)
    labels, count = latents.labels, len(latents.labels)
    classes = options.num_classes or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{source}: labels are not in [0, {classes}): --num_classes")
    options = options.sharded(count, (1 + latents.mirrored) * 4 * math.prod(shape))
    options = dataclasses.replace(options, num_classes=classes)
    listing = hashlib.sha256(latents.listed).hexdigest()
    imported = str(Path(source, options.inside))
    facts = vars(options) | {"imported": imported, "listing": listing}

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        with explained(f"{latents.where(index)}: cannot be imported", HELP):
            parts = latents.load(index)
            channels = latents.channels or options.channels
            return _mean_and_std(parts, shape, channels, options.logvar)

    def write(writer: ShardWriter, indices: Sequence[int]) -> Iterator[int]:
        order = sorted(indices) if latents.forward else indices
        mirrored = (0, count) if latents.mirrored else (0,)
        wanted = (index + offset for index in order for offset in mirrored)
        for index, (mean, std) in in_threads(load, wanted, threads=16):
            writer.write(int(labels[index % count]), index, mean=mean, std=std)
            yield int(index < count)

    build = Build(options, vae, {name: facts[name] for name in MADE_WITH})
    return build.run(
        count,
        write,
        -(-options.shards // PASSES) if latents.forward else 1,
        num_classes=classes,
        class_names=(),
        crop="imported",
        mirror_offset=latents.mirrored * count,
    )


def _mean_and_std(
    parts: Sequence[np.ndarray], shape: Shape, channels: str, logvar: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, (h, w, c) each, of moments, or of the two, or of a latent."""
    h, w, c = shape
    wanted = (c,) if len(parts) == 2 else (2 * c, c)
    arrays = [_channels_last(x, h, w, wanted, channels) for x in parts]
    joined = np.concatenate(arrays, -1)
    mean, std = joined[..., :c], joined[..., c:]
    if not std.size:
        return mean, np.zeros_like(mean)
    if logvar and len(parts) == 1:
        # As diffusers and LDM bound it.
        std = np.exp(np.clip(std, -30.0, 20.0) / 2)
    if (std < 0).any():
        raise ValueError(
            "negative deviations: they may be logarithms of the variance, try --logvar"
        )
    return mean, std


def _channels_last(
    array: np.ndarray, h: int, w: int, wanted: Sequence[int], channels: str
) -> np.ndarray:
    """An array of (c, h, w), (h, w, c) or that in a list of one, channels last; c is
    one of `wanted`."""
    x = array[0] if array.shape[:1] == (1,) and array.ndim == 4 else array
    first = channels != "last" and x.shape in [(c, h, w) for c in wanted]
    last = channels != "first" and x.shape in [(h, w, c) for c in wanted]
    if x.dtype.kind != "f" or not (first or last):
        c = " or ".join(map(str, wanted))
        raise ValueError(
            f"{array.dtype} {array.shape}, not floating-point ({c}, {h}, {w}) or "
            f"({h}, {w}, {c}); --vae and --resolution decide that"
        )
    if first and last:
        raise ValueError(f"give --channels=first or last, {x.shape} fits both")
    return np.moveaxis(x, 0, -1) if first else x


def main() -> None:
    """Import as the flags say and print what was done."""
    parser = Parser(
        prog="sra2 import-latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, file or hub id")
    ImportOptions.add_flags(parser)
    info = import_latents(ImportOptions(**vars(parser.parse_args())))
    print(f"{info.num_examples:,} latents imported" if info else WAITING)
