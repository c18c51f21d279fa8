"""A dataset in the making: shard by shard, killed and resumed, by several processes.

The work lies in `.NAME.incomplete` beside the dataset: the finished shards, and for
each of them, written last, its facts. The records of a shard depend on the options
alone; so the dataset is the same, byte for byte, whoever wrote which shard and however
often it was interrupted. Who finds all shards finished adds the descriptions,
`latents.json` last, and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sra2_jax
from sra2_jax.data import records
from sra2_jax.data.options import Options
from sra2_jax.data.writer import Facts, ShardWriter, flush, manifest, temporary_name
from sra2_jax.errors import UserError

UNREADABLE, LOCK, FACTS = "unreadable.txt", "lock", "facts-*.json"


class Build:
    """Context manager that begins or goes on with a dataset.

    Args:
      options.out: absent, empty, or complete with the same `made_with`.
      shards: number of files.
      made_with: everything that the records depend on, by flag; JSON values.

    Attributes:
      own: shards of this process, every process_count-th, finished ones too.

    Raises:
      UserError: another dataset in `out`, or work begun with other options.
    """

    def __init__(
        self, options: Options, shards: int, made_with: Mapping[str, Any]
    ) -> None:
        self.out, self.split, self.shards = Path(options.out), options.split, shards
        self.folder = self.out.absolute().parent / f".{self.out.name}.incomplete"
        self.own = range(options.process_index, shards, options.process_count)
        self._left: list[int] = []
        self._options, self._versions = json.loads(json.dumps(made_with)), _versions()
        self._made_with = {**self._options, **self._versions}

    def __enter__(self) -> Build:
        if not self.complete():
            self.folder.mkdir(parents=True, exist_ok=True)
            done = self.finished()
            if not self.complete():  # by another process, a moment ago
                self._left = [shard for shard in self.own if shard not in done]
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it is not empty, or has its name
            self.folder.rmdir()

    def complete(self) -> bool:
        """Whether the dataset is there already, and nothing else."""
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

    def finished(self) -> dict[int, Facts]:
        """Facts of the finished shards, of all processes, by number."""
        found = {}
        for path in sorted(self.folder.glob(FACTS)):
            # Without the shard's file it is not finished.
            with contextlib.suppress(FileNotFoundError):
                fields = json.loads(path.read_text())
                there = fields.pop("made_with", {})
                if there != self._made_with:
                    raise UserError(
                        f"{self.folder}: was begun with other options "
                        f"({_differences(there, self._made_with)}); use those, or "
                        "remove the folder"
                    )
                shard, facts = int(path.stem.removeprefix("facts-")), Facts(**fields)
                if self._path(shard).stat().st_size == facts.bytes:
                    found[shard] = facts
        return found

    def left(self, at_once: int = 1) -> Iterator[list[int]]:
        """This process's shards still to write, up to `at_once` at a time."""
        for i in range(0, len(self._left), at_once):
            yield self._left[i : i + at_once]

    @contextlib.contextmanager
    def writing(self, group: Sequence[int]) -> Iterator[ShardWriter]:
        """A writer of the group's shards; they count as finished when it ends well."""
        done = self.finished().values()
        with ShardWriter(self.folder, self.split, self.shards, group) as writer:
            writer.skipped = sum(len(facts.unreadable) for facts in done)
            yield writer
        for shard, facts in writer.facts.items():
            fields = {"made_with": self._made_with, **dataclasses.asdict(facts)}
            temporary = temporary_name(self._path(shard))
            temporary.write_text(json.dumps(fields) + "\n")
            flush(temporary)
            temporary.rename(self.folder / FACTS.replace("*", f"{shard:05d}"))

    def finish(self, **fields: Any) -> records.LatentsInfo | None:
        """Complete the dataset if every shard is finished, else None.

        fields: of `LatentsInfo`, those that the shards do not tell.
        """
        # Another process may be faster, and take the folder away.
        with contextlib.suppress(FileNotFoundError), self._locked():
            if not self.complete():
                facts = self.finished()
                if len(facts) < self.shards:
                    return None
                self._describe([facts[s] for s in range(self.shards)], fields)
                self.folder.rename(self.out)
                flush(self.folder.parent)
        for path in (*self.out.glob(FACTS), self.out / LOCK):
            path.unlink(missing_ok=True)
        return records.LatentsInfo.read(self.out)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold a lock that the system takes back from a process that dies."""
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _describe(self, facts: list[Facts], fields: dict[str, Any]) -> None:
        count = sum(row.records for row in facts)
        if not count:
            shutil.rmtree(self.folder)
            raise UserError(f"{self.out}: none of the images can be decoded")
        shards = {self._path(s) for s in range(self.shards)}
        for path in {*self.folder.glob("latents-*")} - shards:
            path.unlink()  # of a process that was killed
        if unreadable := sorted(row for f in facts for row in f.unreadable):
            text = "".join(f"{line}\n" for _, line in unreadable)
            (self.folder / UNREADABLE).write_text(text, encoding="utf-8")
        height, width, _ = fields["latent_shape"]
        scale, shift = fields["scaling_factor"], fields["shift_factor"]
        info = records.LatentsInfo(
            num_examples=count,
            splits={self.split: manifest(facts)},
            versions=self._versions,
            options=self._options,
            **_sampled(facts, count * height * width, scale, shift),
            **fields,
        )
        write_tfds_metadata(self.folder, info)
        info.write(self.folder)
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.txt")):
            flush(path)

    def _path(self, shard: int) -> Path:
        return Path(records.shard_path(self.folder, self.split, shard, self.shards))


def _sampled(
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


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*now, *there])
        if there.get(key) != now.get(key)
    )


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "tensorflow-datasets", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    tensorflow = records.tensorflow().__version__
    return {"sra2_jax": sra2_jax.__version__, "tensorflow": tensorflow, **found}


def write_tfds_metadata(folder: str | os.PathLike, info: records.LatentsInfo) -> None:
    """Write `features.json` and `dataset_info.json` next to finished shards.

    TFDS reads the first example back, so a schema it cannot decode fails here.
    """
    records.tensorflow()
    import tensorflow_datasets as tfds

    def halves(shape: tuple[int, ...]) -> Any:
        # Without encoding="bytes" TFDS stores float16 as float32 lists, twice as big.
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")

    if info.class_names:
        label = tfds.features.ClassLabel(names=list(info.class_names))
    else:
        label = tfds.features.ClassLabel(num_classes=info.num_classes)
    features = {
        "mean": halves(info.latent_shape),
        "std": halves(info.latent_shape),
        "label": label,
        "index": tfds.features.Scalar(dtype=np.int64),
    }
    if info.images:
        features["image"] = tfds.features.Image(
            shape=(info.resolution, info.resolution, 3), encoding_format="png"
        )
    if stored := info.features:
        features["features"] = halves((stored.grid**2, stored.width))
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=list(shards.records),
                num_bytes=sum(shards.bytes),
            )
            for name, shards in info.splits.items()
        ],
        description=f"Latents of {info.vae} at {info.resolution} pixels.",
    )
