"""One run in a folder at a time; notices when the folder is lost. No jax here."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from typing import Any, Self

from sra2_jax.errors import MISTAKE, Restart, UserError, leave
from sra2_jax.run import Run, number
from sra2_jax.storage import is_remote, patiently, stat

# Without a beat of lock.json until a run counts as dead: it gives one every ten.
STALE_SECONDS, BEAT_SECONDS = 60.0, 10.0


class Lock:
    """Context manager that holds a run's folder, and says so in its lock.json.

    Where the file system has locks the kernel keeps this one and drops it with the
    process, however it ends. Elsewhere (gs://, other machines) the file's beat, written
    every 10 seconds, tells a living run from a dead one. Losing the folder (gone,
    read-only, or taken over) ends the process: status 2.

    Raises:
      UserError: another process of this machine holds it, or it cannot be made.
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
            try:
                self._run.folder.mkdir(parents=True, exist_ok=True)
                self._claim()
                self._write(self._mine | {"beat": time.time()})
            except OSError as error:
                raise UserError(
                    f"{self._run} cannot be written ({error}): use another --workdir"
                ) from error
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
            return
        self._file.seek(0)
        self._file.write(text)
        self._file.truncate()
        self._file.flush()

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
