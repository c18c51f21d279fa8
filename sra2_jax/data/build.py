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
from sra2_jax.data.writer import Facts, ShardWriter, manifest, writing
from sra2_jax.errors import UserError
from sra2_jax.models.vae import VAEConfig
from sra2_jax.run import write_whole

UNREADABLE, LOCK, FACTS = "unreadable.txt", "lock", "facts-*.json"
WAITING = "all shards of this process are written; the dataset appears when all are"


class Build:
    """A dataset that is begun or gone on with.

    Args:
      options: `out` is absent, empty, or complete with the same `made_with`.
      vae: of the latents.
      made_with: everything that the records depend on, by flag; JSON values.

    Attributes:
      own: shards of this process, every process_count-th, finished ones too.
      left: those of them that are still to write.

    Raises UserError: another dataset in `out`, or work begun with other options.
    """

    def __init__(
        self, options: Options, vae: VAEConfig, made_with: Mapping[str, Any]
    ) -> None:
        self.options, self.vae, self.shards = options, vae, options.shards
        self.out, self._made_with = Path(options.out), dict(made_with)
        self.folder = self.out.absolute().parent / f".{self.out.name}.incomplete"
        self._versions = _versions()
        self.own = range(options.process_index, self.shards, options.process_count)
        done = self.finished()
        # Looked at last: another process may be completing it.
        own = () if self.complete() else self.own
        self.left = [shard for shard in own if shard not in done]

    def complete(self) -> bool:
        """Whether the dataset is there already, and nothing else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        why = "exists and is not an empty folder"
        if (self.out / records.FILE).exists():
            there = records.LatentsInfo.read(self.out).options
            if there == self._made_with:
                return True
            why = f"holds another dataset ({_differences(there, self._made_with)})"
        raise UserError(
            f"{self.out}: {why}; nothing is overwritten, choose another --out or "
            "remove it"
        )

    def finished(self) -> dict[int, Facts]:
        """Facts of the finished shards, of all processes, by number."""
        found, wanted = {}, {**self._made_with, **self._versions}
        for path in sorted(self.folder.glob(FACTS)):
            # Without the shard's file, or cut off by a crash, it is not finished.
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                fields = json.loads(path.read_text())
                there = fields.pop("made_with", {})
                if there != wanted:
                    raise UserError(
                        f"{self.folder}: was begun with other options "
                        f"({_differences(there, wanted)}); use those, or remove the "
                        "folder"
                    )
                shard, facts = int(path.stem.removeprefix("facts-")), Facts(**fields)
                if self._path(shard).stat().st_size == facts.bytes:
                    found[shard] = facts
        return found

    @contextlib.contextmanager
    def writing(self, group: Sequence[int]) -> Iterator[ShardWriter]:
        """A writer of the group's shards; they are finished when it ends well."""
        done = self.finished().values()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with writing(self.folder, self.options.split, self.shards, group) as writer:
                writer.skipped = sum(len(facts.unreadable) for facts in done)
                yield writer
        finally:
            with contextlib.suppress(OSError):  # it is not empty
                self.folder.rmdir()
        made_with = {"made_with": {**self._made_with, **self._versions}}
        for shard, facts in writer.facts.items():
            text = json.dumps(made_with | dataclasses.asdict(facts)) + "\n"
            write_whole(self.folder / FACTS.replace("*", f"{shard:05d}"), text)

    def finish(self, **fields: Any) -> records.LatentsInfo | None:
        """Complete the dataset if every shard is finished, else None.

        fields: of `LatentsInfo`, those that neither shards nor options tell.
        """
        # Another process may be faster, and take the folder away.
        with (
            contextlib.suppress(FileNotFoundError),
            (self.folder / LOCK).open("w") as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or the process dies
            if not self.complete():
                facts = self.finished()
                if len(facts) < self.shards:
                    return None
                self._describe([facts[s] for s in range(self.shards)], fields)
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
        shards = {self._path(s) for s in range(self.shards)}
        for path in {*self.folder.glob("latents-*")} - shards:
            path.unlink()  # of a process that was killed
        if unreadable := sorted(row for f in facts for row in f.unreadable):
            text = "".join(f"{line}\n" for _, line in unreadable)
            (self.folder / UNREADABLE).write_text(text, encoding="utf-8")
        shape = options.latent_shape(self.vae)
        mean, std = _statistics(facts, count * shape[0] * shape[1])
        scale, shift = self.vae.scaling_factor, self.vae.shift_factor
        info = records.LatentsInfo(
            vae=options.vae,
            scaling_factor=scale,
            shift_factor=shift,
            resolution=options.resolution,
            latent_shape=shape,
            num_examples=count,
            splits={options.split: manifest(facts)},
            latent_mean=tuple((mean - shift) * scale),
            latent_std=tuple(std * abs(scale)),
            versions=self._versions,
            options=self._made_with,
            **fields,
        )
        write_tfds_metadata(self.folder, info)
        info.write(self.folder)
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.txt")):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _path(self, shard: int) -> Path:
        split = self.options.split
        return Path(records.shard_path(self.folder, split, shard, self.shards))


def _statistics(facts: Sequence[Facts], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of z = mean + std * N(0, 1) per channel, exact, not drawn.

    E[z] from E[mean], E[z^2] from E[mean^2 + std^2]; added in the order of the shards.
    """
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

    features: dict[str, Any] = {
        # Without encoding="bytes" TFDS stores float16 as float32 lists, twice as big.
        name: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
        for name, shape in info.arrays().items()
    }
    names = list(info.class_names) or None
    classes = None if names else info.num_classes
    features["label"] = tfds.features.ClassLabel(num_classes=classes, names=names)
    features["index"] = tfds.features.Scalar(dtype=np.int64)
    if info.images:
        shape = (info.resolution, info.resolution, 3)
        features["image"] = tfds.features.Image(shape=shape, encoding_format="png")
    splits = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=list(s.records), num_bytes=sum(s.bytes)
        )
        for name, s in info.splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=splits,
        description=f"Latents of {info.vae} at {info.resolution} pixels.",
    )
