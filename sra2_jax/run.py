"""A run's folder: every name and format in it, and what a resumed run may change.

Readers of a run that still trains, or was cut off, get what is there; nothing missing
or half written is fatal to them. No jax here: `status` and the report open runs copied
from elsewhere at once.
"""

import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from sra2_jax.config import Config
from sra2_jax.config_file import changes
from sra2_jax.errors import UserError
from sra2_jax.storage import as_json, is_remote, read_json, write_whole

ASIDE = "damaged-"  # and the step: what a damaged checkpoint is renamed to


class Run:
    """The folder of a run, local or remote; making the object touches nothing.

    Args:
      writes: whether this process writes; of several the first does.
    """

    def __init__(self, folder: Any, writes: bool = True) -> None:
        self.folder, self.writes = epath.Path(folder), writes
        self.metrics = self.folder / "metrics.jsonl"
        self.events = self.folder / "events.jsonl"
        self.tensorboard = self.folder / "tensorboard"
        self.checkpoints = self.folder / "checkpoints"
        self.images = self.folder / "images"
        self.report = self.folder / "report.html"
        self.compiled = self.folder / "compiled"
        self.lock = self.folder / "lock.json"

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Whether anything of a run is there."""
        parts = (self.folder / "config.json", self.metrics, self.checkpoints, self.lock)
        return any(part.exists() for part in parts)

    def latents(self, config: Config) -> epath.Path:
        """The folder of its dataset."""
        return epath.Path(config.data.dir or self.folder / "latents")

    def samples(self, step: int) -> epath.Path:
        """The picture of a step's samples."""
        return self.folder / "samples" / f"step_{step:08d}.png"

    def sample_grids(self) -> list[tuple[int, epath.Path]]:
        """(step, picture) of all that are there."""
        paths = (self.folder / "samples").glob("step_*.png")
        found = ((re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in paths)
        return sorted((int(match[1]), path) for match, path in found if match)

    # JSON files: config, versions, run (facts), results (the mark of a finished run)

    def read(self, name: str) -> dict[str, Any]:
        """The object in NAME.json; empty where there is none that can be read."""
        with contextlib.suppress(UserError):
            return read_json(self.folder / f"{name}.json")
        return {}

    def write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write NAME.json, all of it or nothing."""
        if self.writes:
            write_whole(self.folder / f"{name}.json", as_json(facts))

    def config(self) -> Config:
        """The config that it was started with. Raises UserError: no config.json, or
        one that this version cannot use."""
        path = self.folder / "config.json"
        found = read_json(path)
        if isinstance(found.get("data"), dict):
            found["data"].pop("streams", None)  # a key of earlier versions
        try:
            return Config.of(found)
        except (UserError, RecursionError) as error:
            raise UserError(f"{path}: {error}: written by another version?") from error

    def finished(self, step: int) -> bool:
        """Whether it has written its results at `step`."""
        return number(self.read("results"), "step") == step

    def steps(self) -> list[int]:
        """Those with a checkpoint, falling; whole or not."""
        try:
            names = [path.name for path in self.checkpoints.iterdir()]
        except OSError:
            return []
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def whole(self, step: int) -> bool:
        """Whether a checkpoint's arrays and facts are there, these as they were saved
        (the arrays are held against them when the run goes on)."""
        folder, names = self.checkpoints / str(step), ("_METADATA", "manifest.ocdbt")
        try:
            facts = read_json(folder / "fingerprint" / "metadata")
        except UserError:
            return False
        saved = facts.pop("sha256", None) == digest(facts)
        wanted = [folder / "state" / name for name in names]
        if is_remote(folder):  # Orbax's last word, where it cannot rename a folder
            wanted.append(folder / "commit_success.txt")
        return saved and all(path.exists() for path in wanted)

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows of metrics.jsonl that have a step, in the order written."""
        rows = []
        with contextlib.suppress(OSError):
            for line in self.metrics.read_bytes().splitlines():
                # The line being written, or one torn by a crash, is left out.
                with contextlib.suppress(ValueError, RecursionError):
                    rows.append(json.loads(line))
        return [row for row in rows if number(row, "step") is not None]

    def claim(self, config: Config, versions: Mapping[str, Any]) -> None:
        """Make the folder and write config.json and versions.json.

        Of a run that goes on it prints each key of the config that has changed.

        Raises:
          UserError: its run has another value of a key that a resumed run must not
            change, or its config cannot be read. Nothing is changed then.
        """
        if self.steps():
            try:
                before = self.config()
            except UserError as error:
                raise UserError(
                    f"{self} holds checkpoints, but {error}: put the run's own "
                    "config.json back or use another --workdir"
                ) from error
            fixed, free = changes(before, config)
            if fixed:
                raise UserError(
                    f"{self} holds a run of another config: {'; '.join(fixed)}: set "
                    "them back or use another --workdir"
                )
            for line in free if self.writes else ():
                print(f"resumed with {line}", file=sys.stderr, flush=True)
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write("config", config.to_dict())
        self.write("versions", versions)

    def claim_dataset(self, folder: Any, sha256: str) -> None:
        """See that a run goes on with its dataset, by the digest of its description:
        it may move, but not become another one (UserError)."""
        before = lookup(self.read("run"), "latents", "sha256")
        if self.steps() and before not in (None, sha256):
            raise UserError(
                f"{folder} is not the dataset that {self} was trained on (SHA-256 of "
                f"its latents.json: {str(before)[:12]} -> {sha256[:12]}): give that "
                "one or use another --workdir"
            )


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what is saved beside a checkpoint's arrays."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def lookup(value: Any, *keys: str) -> Any:
    """value[key][key]..., None where anything on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any, *keys: str) -> Any:
    """`lookup` for a finite number, None for anything else."""
    found = lookup(value, *keys)
    if type(found) is int:
        return found if abs(found) < 2**53 else None
    return found if type(found) is float and math.isfinite(found) else None
