"""A run's folder: every name and format in it, what a resumed run may change, and the
lock that keeps a second run out.

Readers of a run that still trains, or was cut off, get what is there; nothing missing
or half written is fatal to them. No jax here: `status` and the report open runs copied
from elsewhere at once.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from etils import epath

from sra2_jax.config import Config
from sra2_jax.config_file import changes
from sra2_jax.errors import MISTAKE, Restart, UserError, explained, leave
from sra2_jax.storage import is_remote, patiently, read_json, stat, write_json

# Without a beat of lock.json until a run counts as dead: it gives one every ten.
STALE_SECONDS, BEAT_SECONDS = 60.0, 10.0
ASIDE = "damaged-"  # and the step: what a damaged checkpoint is renamed to


class Run:
    """The folder of a run, local or remote; making the object touches nothing.

    writes: whether this process writes; of several the first does.
    """

    def __init__(self, folder: Any, writes: bool = True) -> None:
        self.folder, self.writes = epath.Path(folder), writes
        self.metrics = self.folder / "metrics.jsonl"
        self.events = self.folder / "events.jsonl"
        self.tensorboard = self.folder / "tensorboard"
        self.profile = self.folder / "profile"
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

    def read(self, name: str) -> dict[str, Any]:
        """The object in NAME.json; empty where there is none that can be read. NAME:
        config, versions, run (facts), results (the mark of a finished run)."""
        with contextlib.suppress(UserError):
            return read_json(self.folder / f"{name}.json")
        return {}

    def write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write NAME.json, all of it or nothing."""
        if self.writes:
            write_json(self.folder / f"{name}.json", facts)

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
        with contextlib.suppress(OSError):
            names = [path.name for path in self.checkpoints.iterdir()]
            return sorted((int(n) for n in names if n.isdecimal()), reverse=True)
        return []

    def whole(self, step: int) -> bool:
        """Whether a checkpoint's arrays and facts are there, these as they were saved
        (the arrays are held against them when the run goes on)."""
        folder = self.checkpoints / str(step)
        wanted = ["state/_METADATA", "state/manifest.ocdbt"]
        if is_remote(folder):  # Orbax's last word, where it cannot rename a folder
            wanted.append("commit_success.txt")
        with contextlib.suppress(UserError):
            facts = read_json(folder / "fingerprint" / "metadata")
            saved = facts.pop("sha256", None) == digest(facts)
            return saved and all((folder / name).exists() for name in wanted)
        return False

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

        Raises UserError: its run has another value of a key that a resumed run must not
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


class Lock:
    """Context manager that holds a run's folder, and says so in its lock.json.

    Where the file system has locks the kernel keeps this one and drops it with the
    process, however it ends. Elsewhere (gs://, other machines) the file's beat, written
    every 10 seconds, tells a living run from a dead one. Losing the folder (gone,
    read-only, or taken over) ends the process: status 2.

    Raises UserError: another process of this machine holds it, or it cannot be made;
    Restart: a process of another machine held it less than a minute ago.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        if self._run.writes:
            what, advice = f"{self._run} cannot be written", "use another --workdir"
            with explained(what, advice, OSError):
                self._run.folder.mkdir(parents=True, exist_ok=True)
                self._claim()
                self._write(self._mine | {"beat": time.time()})
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._run.writes:
            return
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the run's own end matters more
            # Not removed: another process may have it open and be about to lock it.
            self._write({})
        if self._file is not None:
            self._file.close()

    def _claim(self) -> None:
        """The kernel's lock, where there is one; no living run of another machine."""
        self._file: Any = None
        if not is_remote(self._run):
            self._run.lock.touch()
            self._file = open(self._run.lock, "r+")  # noqa: SIM115
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self._run} is in use by {self._holder()}: wait for it, stop it, "
                    "or use another --workdir"
                ) from None
            except OSError:  # a file system without locks
                self._file.close()
                self._file = None
        held = self._run.read("lock")
        age = time.time() - (number(held, "beat") or 0.0)
        local = held.get("host") == self._mine["host"] and self._file is not None
        if not local and age < STALE_SECONDS:
            raise Restart(
                f"{self._run} was in use {age:.0f} s ago by {self._holder()}: if that "
                f"run is dead, start again in {STALE_SECONDS - age:.0f} s"
            )

    def _holder(self) -> str:
        return "process {pid} on {host}, started {started}".format_map(
            dict.fromkeys(self._mine, None) | self._run.read("lock")
        )

    def _write(self, facts: dict[str, Any]) -> None:
        """In place, which a full disk does not prevent."""
        text = json.dumps(facts) + "\n"
        if self._file is None:
            self._run.lock.write_text(text)
        else:
            os.pwrite(self._file.fileno(), text.encode(), 0)
            self._file.truncate(len(text))

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                patiently(self._renew)
            except OSError as error:
                leave(
                    f"error: {self._run} is lost ({error}): mend it and run the same "
                    "command again to go on from the last checkpoint",
                    MISTAKE,
                )

    def _renew(self) -> None:
        stat(self._run.lock)  # it is there
        held = self._run.read("lock")
        if held and {k: held.get(k) for k in self._mine} != self._mine:
            raise OSError(f"taken over by {self._holder()}")
        self._write(self._mine | {"beat": time.time()})


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
