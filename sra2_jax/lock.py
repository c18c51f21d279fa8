"""One run in a folder at a time; notices when the folder is lost. No jax here."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from typing import Any, Self

from sra2_jax.errors import MISTAKE, Restart, UserError, leave
from sra2_jax.run import TRIES, Run, number

# Without a beat of lock.json until a run counts as dead: it gives one every ten.
STALE_SECONDS, BEAT_SECONDS = 60.0, 10.0
# A lock that the file system does not have.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


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
        self._run, self._path = run, run.lock
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        self._file: int | None = None
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if not self._run.writes:
            return self
        try:
            self._run.folder.mkdir(parents=True, exist_ok=True)
            if "://" not in str(self._path):
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
                self._claim(self._file)
            self._refuse_living()
            self._write(self._mine | {"beat": time.time()})
        except OSError as error:
            raise UserError(
                f"{self._run} cannot be written ({error.strerror or error}): use "
                "another --workdir"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
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
            os.close(self._file)

    def _claim(self, file: int) -> None:
        """The kernel's lock, where there is one."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._run} is in use by {self._holder()}: wait for it, stop it, or "
                "use another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def _refuse_living(self) -> None:
        """Refuse another machine's lock with a fresh beat."""
        held = self._run.read("lock")
        age = time.time() - (number(held, "beat") or 0.0)
        local = held.get("host") == self._mine["host"] and self._file is not None
        if not local and age < STALE_SECONDS:
            raise Restart(
                f"{self._run} was in use {age:.0f} s ago by {self._holder()}: if that "
                f"run is dead, start again in {STALE_SECONDS - age:.0f} s"
            )

    def _holder(self) -> str:
        held = self._run.read("lock")
        return (
            f"process {held.get('pid')} on {held.get('host')}, started "
            f"{held.get('started')}"
        )

    def _write(self, facts: dict[str, Any]) -> None:
        data = json.dumps(facts).encode() + b"\n"
        if self._file is None:
            self._path.write_bytes(data)
            return
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            for pause in (*TRIES, None):
                try:
                    self._check()
                    self._write(self._mine | {"beat": time.time()})
                    break
                except OSError as error:
                    if pause is None:
                        leave(
                            f"error: {self._run} is lost ({error.strerror or error}): "
                            "mend it and run the same command again to go on from the "
                            "last checkpoint",
                            MISTAKE,
                        )
                    time.sleep(pause)

    def _check(self) -> None:
        """The file is still there and ours."""
        if self._file is not None:
            found, opened = os.stat(self._path), os.fstat(self._file)
            if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
                raise OSError(errno.ESTALE, "it was replaced")
        held = self._run.read("lock")
        if held and {k: held.get(k) for k in self._mine} != self._mine:
            leave(f"stopped: {self._run} was taken over by {self._holder()}", MISTAKE)
