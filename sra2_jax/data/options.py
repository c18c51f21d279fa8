"""What a dataset of latents is made with: a field is a flag of the programs."""

import dataclasses
import math
from argparse import ArgumentParser
from typing import Any, Self

from sra2_jax.data import records
from sra2_jax.errors import UserError, explained
from sra2_jax.models.vae import VAEConfig

# Shards of 64 to 128 MB: large enough to stream well, small enough to move.
SHARD_BYTES = 128 * 2**20
# So that several processes can encode at once.
MIN_SHARDS = 8


def option(default: Any, text: str, **more: Any) -> Any:
    """A field whose flag has this help; `more`, such as choices, is argparse's."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True)
class Options:
    """What every dataset is made with, each field a flag.

    Raises UserError: a value that none can be made with.
    """

    out: str = option("", "local folder to make")
    vae: str = option("", "of the latents: diffusers folder or hub id")
    resolution: int = option(256, "of the images, pixels")
    statistics: str = option(
        "", "mean and std of each channel: a file, or computed; by default the VAE's"
    )
    split: str = option("train", "split to write, and to read where there are any")
    shards: int = option(0, "number of files; by default from the size")
    process_index: int = option(0, "of this process, from 0")
    process_count: int = option(
        1, "processes that share the work, each with the same other flags"
    )

    def __post_init__(self) -> None:
        if "://" in str(self.out):
            raise UserError(f"{self.out}: give a local folder, and copy it there")
        with explained("--split", "choose another", ValueError):
            records.check_split(self.split)
        if not 0 <= self.process_index < self.process_count:
            raise UserError("--process_index: count from 0, below --process_count")

    @classmethod
    def add_flags(cls, parser: ArgumentParser) -> None:
        """A flag for each field that has a help."""
        for f in dataclasses.fields(cls):
            if not (more := dict(f.metadata)):
                continue
            switch = f.default is False
            more |= {"action": "store_true"} if switch else {"type": type(f.default)}
            if f.default:
                more["help"] += " (%(default)s)"
            parser.add_argument(f"--{f.name}", default=f.default, **more)

    def latent_shape(self, config: VAEConfig) -> tuple[int, int, int]:
        """(h, w, c) of the VAE's latents. Raises UserError: the resolution is no
        multiple of its downsampling."""
        if self.resolution < 1 or self.resolution % config.downsample:
            raise UserError(
                f"--resolution={self.resolution} is not a multiple of "
                f"{config.downsample}, the downsampling of {self.vae}"
            )
        side = self.resolution // config.downsample
        return side, side, config.latent_channels

    def sharded(self, length: int, size: int) -> Self:
        """With a number of shards: as asked for, or a power of two, which processes
        share evenly.

        size: bytes of what each of `length` images leaves, about.

        Raises UserError: more shards than images, or less than none.
        """
        wanted = max(MIN_SHARDS, length * size / SHARD_BYTES)
        shards = self.shards or min(length, 2 ** math.ceil(math.log2(wanted)))
        if not 1 <= shards <= length:
            raise UserError(f"--shards={shards} for {length} images")
        return dataclasses.replace(self, shards=shards)
