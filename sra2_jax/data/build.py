"""A dataset in the making: shard by shard, killed and resumed, by several processes.

The work lies in `.NAME.incomplete` beside the dataset: the options (`plan.json`), the
finished shards, and for each of them, written last, its facts. The records of a shard
depend on the options alone; so the dataset is the same, byte for byte, whoever wrote
which shard and however often it was interrupted. Who finds all shards finished adds
the descriptions, `latents.json` last, and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sra2_jax
from sra2_jax.data import records
from sra2_jax.data.shards import Facts, ShardWriter, flush, manifest
from sra2_jax.data.tfds_metadata import write_tfds_metadata
from sra2_jax.errors import UserError
from sra2_jax.models.vae import VAEConfig

UNREADABLE = "unreadable.txt"
PLAN, LOCK = "plan.json", "lock"
# Shards of 64 to 128 MB: large enough to stream well, small enough to move.
SHARD_BYTES = 128 * 2**20
# So that several readers have shards of their own (data.streams).
MIN_SHARDS = 8


def latent_shape(config: VAEConfig, resolution: int, vae: str) -> tuple[int, int, int]:
    """(h, w, c) of the latents of square images.

    Raises:
      UserError: no multiple of the downsampling of `vae`, whose config this is.
    """
    if resolution < 1 or resolution % config.downsample:
        raise UserError(
            f"resolution {resolution} is not a multiple of {config.downsample}, the "
            f"downsampling of {vae}; change --resolution"
        )
    side = resolution // config.downsample
    return side, side, config.latent_channels


def record_size(
    shape: tuple[int, int, int],
    pixels: int = 0,
    features: records.Features | None = None,
) -> int:
    """Bytes of a record, about; a PNG, where `pixels` is its side, as two for each."""
    stored = features.grid**2 * features.width if features else 0
    return 4 * math.prod(shape) + 2 * pixels**2 + 2 * stored


def choose_shards(shards: int | None, length: int, size: int) -> int:
    """The number asked for, else a power of two, so that readers share them evenly.

    size: bytes of what an image leaves, about.

    Raises:
      UserError: more shards than images, or none.
    """
    if shards is None:
        wanted = max(MIN_SHARDS, length * size / SHARD_BYTES)
        return min(length, 2 ** math.ceil(math.log2(wanted)))
    if not 1 <= shards <= length:
        raise UserError(
            f"--shards={shards} for {length} images; use a number from 1 to {length}"
        )
    return shards


@contextlib.contextmanager
def building(
    out: str | os.PathLike,
    split: str,
    shards: int,
    options: Mapping[str, Any],
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Build]:
    """Begin or go on with a dataset.

    Args:
      out: local folder that is absent, empty, or complete with the same options.
      options: everything that the records depend on, by flag; JSON values.
      process_index, process_count: this process writes every process_count-th shard.

    Raises:
      UserError: another dataset in `out`, other options than the work began with,
        another process at the same work, numbers or names that do not fit.
    """
    try:
        records.check_split(split)
    except ValueError as error:
        raise UserError(f"--split: {error}; choose another") from None
    if not 0 <= process_index < process_count:
        raise UserError(
            f"--process_index={process_index} of --process_count={process_count}: "
            "count processes from 0"
        )
    tag = f".{process_index}-of-{process_count}"
    build = Build(_local(out), split, shards, dict(options), tag)
    if build.complete():
        yield build
        return
    build.folder.mkdir(parents=True, exist_ok=True)
    with _locked(build.folder / f"{LOCK}{tag}", wait=False):
        if build.complete():  # by another process, a moment ago
            shutil.rmtree(build.folder)
        else:
            build.compare()
            if not (build.folder / records.FILE).exists():  # else it lacks its name
                build.own = list(range(process_index, shards, process_count))
        try:
            yield build
        finally:
            if process_count == 1:
                build.discard_if_empty()


class Build:
    """See `building`. `own` are the shards of this process, finished ones too."""

    def __init__(
        self, out: Path, split: str, shards: int, options: dict[str, Any], tag: str
    ) -> None:
        self.out, self.split, self.shards = out, split, shards
        self.folder = out.absolute().parent / f".{out.name}.incomplete"
        self.own: list[int] = []
        self._options = json.loads(json.dumps(options))
        self._tag = tag

    def complete(self) -> bool:
        """Whether the dataset is there already.

        Raises:
          UserError: something else is there.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        why = "exists and is not an empty folder"
        if (self.out / records.FILE).exists():
            there = records.LatentsInfo.read(self.out).options
            if there == self._options:
                return True
            why = f"holds another dataset ({_differences(there, self._options)})"
        raise UserError(
            f"{self.out}: {why}; nothing is overwritten, choose another --out or "
            "remove it"
        )

    def compare(self) -> None:
        """Note options and versions, or compare them with those of the first start."""
        plan = {"options": self._options, "versions": _versions()}
        path = self.folder / PLAN
        temporary = self.folder / f"{PLAN}{self._tag}.tmp"
        temporary.write_text(json.dumps(plan, indent=1) + "\n")
        flush(temporary)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # a rename would replace another process's
        temporary.unlink()
        there = json.loads(path.read_text())
        if there != plan:
            both = ({**p["options"], **p["versions"]} for p in (there, plan))
            raise UserError(
                f"{self.folder}: was begun with other options "
                f"({_differences(*both)}); use those, or remove the folder"
            )

    def groups(self, at_once: int) -> Iterator[list[int]]:
        """Shards still to write, up to `at_once` at a time."""
        left = [s for s in self.own if not self._read(s)]
        for i in range(0, len(left), at_once):
            yield left[i : i + at_once]

    def unreadable(self) -> list[tuple[int, str]]:
        """(index, line) of the images that left no record, of all finished shards."""
        found = [facts["unreadable"] for facts in map(self._read, self._all()) if facts]
        return sorted((index, line) for lines in found for index, line in lines)

    @contextlib.contextmanager
    def writing(
        self, group: Sequence[int], unreadable: Sequence[tuple[int, str]]
    ) -> Iterator[ShardWriter]:
        """A writer of the group's shards; they count as finished when it ends well.

        unreadable: read at the end.
        """
        with ShardWriter(
            self.folder, self.split, self.shards, group, self._tag
        ) as writer:
            yield writer
        for shard, facts in writer.facts().items():
            lines = [row for row in unreadable if row[0] % self.shards == shard]
            fields = {**dataclasses.asdict(facts), "unreadable": lines}
            path = self._facts_path(shard)
            temporary = path.with_name(f"{path.name}{self._tag}.tmp")
            temporary.write_text(json.dumps(fields) + "\n")
            flush(temporary)
            temporary.rename(path)

    def finish(
        self, *, scaling_factor: float, shift_factor: float, **fields: Any
    ) -> records.LatentsInfo | None:
        """Complete the dataset if every shard is finished, else None.

        fields: of `LatentsInfo`, those that the shards do not tell.

        Raises:
          UserError: no records.
        """
        # Last of all go the lock and the plan, which need no name of their own.
        try:
            with _locked(self.folder / LOCK, wait=True):
                if not (self.folder / records.FILE).exists():
                    if not all(map(self._read, self._all())) and self.folder.exists():
                        return None
                    self._describe(scaling_factor, shift_factor, fields)
                self._tidy()
                self.folder.rename(self.out)
                flush(self.folder.parent)
        except FileNotFoundError:
            if not (self.out / records.FILE).exists():
                raise
            # Another process was faster, or an earlier run.
        for name in (LOCK, PLAN):
            (self.out / name).unlink(missing_ok=True)
        return records.LatentsInfo.read(self.out)

    def _describe(self, scale: float, shift: float, fields: dict[str, Any]) -> None:
        facts = [self._read(shard) for shard in self._all()]
        unreadable = self.unreadable()
        rows = [Facts(**{k: f[k] for k in f if k != "unreadable"}) for f in facts if f]
        count = sum(row.records for row in rows)
        if not count:
            shutil.rmtree(self.folder)
            raise UserError(
                f"{self._options.get('images')}: none of its images can be decoded"
            )
        if unreadable:
            text = "".join(f"{line}\n" for _, line in unreadable)
            (self.folder / UNREADABLE).write_text(text, encoding="utf-8")
        height, width, _ = fields["latent_shape"]
        info = records.LatentsInfo(
            scaling_factor=scale,
            shift_factor=shift,
            num_examples=count,
            splits={self.split: manifest(rows)},
            versions=json.loads((self.folder / PLAN).read_text())["versions"],
            options=self._options,
            **sampled(rows, count * height * width, scale, shift),
            **fields,
        )
        write_tfds_metadata(self.folder, info)
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.txt")):
            flush(path)
        info.write(self.folder)
        flush(self.folder / records.FILE)

    def _tidy(self) -> None:
        for pattern in ("facts-*.json", "*.tmp", f"{LOCK}.*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def discard_if_empty(self) -> None:
        """Remove the folder if no shard is finished: nothing would be lost."""
        if (
            not any(map(self._read, self._all()))
            and not (self.folder / records.FILE).exists()
        ):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> range:
        return range(self.shards)

    def _facts_path(self, shard: int) -> Path:
        return self.folder / f"facts-{shard:05d}.json"

    def _read(self, shard: int) -> dict[str, Any] | None:
        """Facts of a shard, None until it is finished."""
        path = records.shard_path(self.folder, self.split, shard, self.shards)
        try:
            facts = json.loads(self._facts_path(shard).read_text())
            return facts if os.path.getsize(path) == facts["bytes"] else None
        except FileNotFoundError:
            return None


def sampled(
    facts: Sequence[Facts], positions: int, scale: float, shift: float
) -> dict[str, Any]:
    """Exactly instead of drawn, mean and deviation of (z - shift) * scale, where
    z = mean + std * N(0, 1), per channel: E[z] from E[mean], E[z^2] from
    E[mean^2 + std^2]. The sums are added in the order of the shards."""
    filled = [row for row in facts if row.records]
    mean = np.sum([row.mean for row in filled], axis=0) / positions
    square = np.sum([row.square for row in filled], axis=0) / positions
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return {
        "latent_mean": tuple((mean - shift) * scale),
        "latent_std": tuple(std * abs(scale)),
    }


def _local(out: str | os.PathLike) -> Path:
    if "://" in os.fspath(out):
        raise UserError(f"{out}: encode into a local folder, then copy it there")
    return Path(out)


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*now, *there])
        if there.get(key) != now.get(key)
    )


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock that the system takes back from a process that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{path.parent}: another process is writing these shards; wait for it, "
                "or give each a --process_index of --process_count"
            ) from None
        yield


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "tensorflow-datasets", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    tensorflow = records.tensorflow().__version__
    return {"sra2_jax": sra2_jax.__version__, "tensorflow": tensorflow, **found}
