"""A dataset in the making: shard by shard, killed and resumed, by several processes.

The work lies in `.NAME.incomplete` beside the dataset: the finished shards, and for
each of them, written last, its facts. The records of a shard depend on the options
alone. Who finds all shards finished adds the descriptions and renames the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import sra2_jax
from sra2_jax import tfrecord
from sra2_jax.data import records
from sra2_jax.data.options import Options
from sra2_jax.data.order import permutation
from sra2_jax.errors import UserError, explained
from sra2_jax.models.vae import VAEConfig
from sra2_jax.storage import sha256, write_whole
from sra2_jax.weights import read_statistics

UNREADABLE, LOCK, FACTS = "unreadable.txt", "lock", "facts-*.json"
COMPUTED = "computed"  # statistics: those of the dataset itself
WAITING = "all shards of this process are written; the dataset appears when all are"


@dataclasses.dataclass
class Facts:
    """What the manifest says of one shard, and sums of its latents per channel.

    mean: of E[z]; square: of E[z^2] = mean^2 + std^2; over records and positions.
    unreadable: (index, line of the report) of the images that left no record.
    """

    records: int = 0
    bytes: int = 0
    sha256: str = ""
    mean: Sequence[float] = ()
    square: Sequence[float] = ()
    unreadable: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def manifest(facts: Sequence[Facts]) -> records.Shards:
    """The manifest of all shards of a split, in order."""
    names = [field.name for field in dataclasses.fields(records.Shards)]
    return records.Shards(*(tuple(getattr(f, n) for f in facts) for n in names))


class ShardWriter:
    """Writes records to their shards, see `writing`.

    facts: of each shard by number, whole once `writing` has ended; skipped: images that
    left no record, in all shards that the caller counts.
    """

    def __init__(self, shard_of: np.ndarray, files: Mapping[int, Any]) -> None:
        self._shard_of, self._files, self.skipped = shard_of, files, 0
        self.facts = {shard: Facts() for shard in files}

    def shard(self, index: int) -> int:
        """The shard of an image, and of its mirrored one (index + length)."""
        return int(self._shard_of[index % len(self._shard_of)])

    def write(
        self, label: int, index: int, image: bytes | None = None, **arrays: np.ndarray
    ) -> None:
        """Append one record: the label, the index in the source, `arrays` (see
        `LatentsInfo.arrays`), as raw numbers, and the PNG of the crop if it is stored.

        Raises UserError: numbers that float16 does not hold.
        """
        with np.errstate(over="ignore"):
            halves = {name: x.astype(records.raw(name)) for name, x in arrays.items()}
        for name, x in halves.items():
            if not np.isfinite(x).all():
                raise UserError(
                    f"the {name} of image {index} is not finite or too large for "
                    "float16: encode it with --dtype=float32, or check the weights"
                )
        shard = self.shard(index)
        texts = {name: x.tobytes() for name, x in halves.items()}
        if image is not None:
            texts["image"] = image
        record = tfrecord.serialize({"label": label, "index": index, **texts})
        self._files[shard].write(tfrecord.frame(record))
        mean, std = (halves[name].astype(np.float64) for name in records.MOMENTS)
        sums, facts = np.stack([mean, mean**2 + std**2]).sum((1, 2)), self.facts[shard]
        if facts.records:
            sums += [facts.mean, facts.square]
        facts.mean, facts.square = sums.tolist()
        facts.records += 1

    def skip(self, index: int, line: str) -> int:
        """Note an image that leaves no record; returns how many there are."""
        self.facts[self.shard(index)].unreadable.append((index, line))
        self.skipped += 1
        return self.skipped


@contextlib.contextmanager
def writing(
    folder: str | os.PathLike, split: str, shard_of: np.ndarray, own: Iterable[int]
) -> Iterator[ShardWriter]:
    """A writer of the shards `own` in a local folder.

    shard_of: int (images,), the shard of each.

    They have temporary names; once the context ends without an error, they are flushed
    to the disk, hashed, and get their own.

    Raises UserError: the disk is full, or another process writes the same shard.
    """
    files, shards = {}, int(shard_of.max()) + 1
    # Should two processes write the same shard, each writes its own file.
    mark = f".{secrets.token_hex(4)}.tmp"
    advice = (
        "is the disk full, or another process at work there? Mend that and run the "
        "same command again"
    )
    with (
        explained(f"{folder}: not finished", advice, OSError),
        contextlib.ExitStack() as stack,
    ):
        for shard in own:
            path = Path(f"{records.shard_path(folder, split, shard, shards)}{mark}")
            stack.callback(path.unlink, missing_ok=True)
            files[shard] = stack.enter_context(path.open("wb"))
        writer = ShardWriter(shard_of, files)
        yield writer
        for shard, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            facts, path = writer.facts[shard], Path(file.name)
            facts.bytes, facts.sha256 = file.tell(), sha256(path)
            path.rename(path.with_name(path.name.removesuffix(mark)))


# Writes the records of these positions of a listing; yields how many it has done.
Write = Callable[[ShardWriter, Sequence[int]], Iterator[int]]


class Build:
    """A dataset that is begun, or gone on with.

    Args:
      options: `out` is absent, empty, or complete with the same `made_with`.
      vae: of the latents.
      made_with: everything that the records depend on, by flag; JSON values.

    Raises UserError: another dataset in `out`, work begun with other options, or a file
    of statistics that has none.
    """

    def __init__(
        self, options: Options, vae: VAEConfig, made_with: Mapping[str, Any]
    ) -> None:
        self.options, self.vae, self.out = options, vae, Path(options.out)
        if text := options.statistics:
            if text != COMPUTED:
                self.vae = read_statistics(Path(text), vae)
                text = f"{self.vae.latents_mean}, {self.vae.latents_std}"
            self.vae = replace(self.vae, scaling_factor=1.0, shift_factor=0.0)
            made_with = {**made_with, "statistics": text}
        self.folder = self.out.absolute().parent / f".{self.out.name}.incomplete"
        self._made_with = {**made_with, "order": "shuffled"}
        packages = ("jax", "flax", "pillow")
        self._versions = {"sra2_jax": sra2_jax.__version__}
        self._versions |= {name: importlib.metadata.version(name) for name in packages}
        self._begun = self._made_with | self._versions  # what goes on is of the same

    def complete(self) -> bool:
        """Whether the dataset is there already, and nothing else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        why = "it is not an empty folder"
        if (self.out / records.FILE).exists():
            there = records.LatentsInfo.read(self.out).options
            if there == self._made_with:
                return True
            why = f"another dataset, {_differences(there, self._made_with)}"
        raise UserError(
            f"{self.out}: nothing is overwritten ({why}); choose another --out"
        )

    def finished(self) -> dict[int, Facts]:
        """Facts of the finished shards, of all processes, by number."""
        found = {}
        for path in self.folder.glob(FACTS):
            # Without the shard's file, or cut off by a crash, it is not finished.
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                fields = json.loads(path.read_text())
                there = fields.pop("made_with", {})
                if there != self._begun:
                    raise UserError(
                        f"{self.folder}: begun with other options: use those, or "
                        f"remove it ({_differences(there, self._begun)})"
                    )
                shard, facts = int(path.stem.removeprefix("facts-")), Facts(**fields)
                if self._path(shard).stat().st_size == facts.bytes:
                    found[shard] = facts
        return found

    def run(
        self, length: int, write: Write, at_once: int = 1, **fields: Any
    ) -> records.LatentsInfo | None:
        """Write this process's shards of a listing that are not finished yet.

        A listing is sorted by class: it is written in a permutation.

        at_once: shards that `write` gets in one call; fields: of `LatentsInfo`, those
        that neither shards nor options tell.

        Returns what the dataset is, None while other processes have shards to write.
        """
        options, done = self.options, self.finished()
        own = range(options.process_index, options.shards, options.process_count)
        # Looked at last: another process may be completing it.
        left = [] if self.complete() else [s for s in own if s not in done]

        order, written = permutation(length, 0), np.arange(length) % options.shards
        shard_of = np.empty_like(written)
        shard_of[order] = written

        def listed(shards: Sequence[int]) -> list[int]:
            return order[np.isin(written, shards)].tolist()

        total, missing = len(listed(own)), len(listed(left))
        with tqdm(
            total=total, initial=total - missing, delay=10, mininterval=10, unit="image"
        ) as bar:
            for start in range(0, len(left), at_once):
                group, done = left[start : start + at_once], self.finished()
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    with writing(self.folder, options.split, shard_of, group) as writer:
                        writer.skipped = sum(len(f.unreadable) for f in done.values())
                        for count in write(writer, listed(group)):
                            bar.update(count)
                finally:
                    with contextlib.suppress(OSError):  # it is not empty
                        self.folder.rmdir()
                for shard, facts in writer.facts.items():
                    row = {"made_with": self._begun} | dataclasses.asdict(facts)
                    path = self.folder / FACTS.replace("*", f"{shard:05d}")
                    write_whole(path, json.dumps(row) + "\n")
        return self._finish(fields)

    def _finish(self, fields: dict[str, Any]) -> records.LatentsInfo | None:
        """Complete the dataset if every shard is finished, else None."""
        # Another process may be faster, and take the folder away.
        with (
            contextlib.suppress(FileNotFoundError),
            (self.folder / LOCK).open("w") as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or the process dies
            if not self.complete():
                done = self.finished()
                if len(done) < self.options.shards:
                    return None
                self._describe([done[s] for s in sorted(done)], fields)
                self.folder.rename(self.out)
        for path in (*self.out.glob(FACTS), self.out / LOCK):
            path.unlink(missing_ok=True)
        return records.LatentsInfo.read(self.out)

    def _describe(self, facts: list[Facts], fields: dict[str, Any]) -> None:
        """Write all that a dataset holds besides its shards."""
        options, count = self.options, sum(row.records for row in facts)
        if not count:
            shutil.rmtree(self.folder)
            raise UserError(f"{self.out}: none of the images can be decoded")
        shards = {self._path(s) for s in range(len(facts))}
        for path in {*self.folder.glob("latents-*")} - shards:
            path.unlink()  # of a process that was killed
        if unreadable := sorted(row for f in facts for row in f.unreadable):
            text = "".join(f"{line}\n" for _, line in unreadable)
            (self.folder / UNREADABLE).write_text(text, encoding="utf-8")
        shape = options.latent_shape(self.vae)
        mean, std = _statistics(facts, count * shape[0] * shape[1])
        vae = self.vae
        if options.statistics == COMPUTED:
            vae = replace(
                vae, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist())
            )
        shift = vae.shift_factor + np.array(vae.latents_mean or 0.0)
        scale = vae.scaling_factor / np.array(vae.latents_std or 1.0)
        info = records.LatentsInfo(
            vae=options.vae,
            scaling_factor=vae.scaling_factor,
            shift_factor=vae.shift_factor,
            channel_mean=vae.latents_mean,
            channel_std=vae.latents_std,
            resolution=options.resolution,
            latent_shape=shape,
            num_examples=count,
            splits={options.split: manifest(facts)},
            latent_mean=tuple((mean - shift) * scale),
            latent_std=tuple(std * scale),
            versions=self._versions,
            options=self._made_with,
            **fields,
        )
        records.write_tfds_metadata(self.folder, info)
        info.write(self.folder)
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.txt")):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _path(self, shard: int) -> Path:
        split, count = self.options.split, self.options.shards
        return Path(records.shard_path(self.folder, split, shard, count))


def _statistics(facts: Sequence[Facts], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel of z = mean + std * N(0, 1), exact, not drawn."""
    filled = [row for row in facts if row.records]
    mean = np.sum([row.mean for row in filled], axis=0) / count
    square = np.sum([row.square for row in filled], axis=0) / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*now, *there])
        if there.get(key) != now.get(key)
    )
