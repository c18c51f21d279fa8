"""Files in local folders and in buckets (gs://), by the same calls.

A file in a bucket appears whole or not at all, when it is closed; it cannot be appended
to, and there are no folders. No jax here.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import fsspec
from etils import epath
from etils.epath import backend

from sra2_jax.errors import UserError, explained

TRIES = (0.5, 1, 2)  # seconds between them
CLIENTS = ("gcsfs", "google.cloud.storage")  # ours and Orbax's
Made = TypeVar("Made")

# TensorFlow's file system knows no server but Google's, and would bring TensorFlow in.
backend.tf_backend = backend.fsspec_backend
for protocol in ("gs", "gcs"):
    fsspec.register_implementation(protocol, "sra2_jax.bucket.Bucket", clobber=True)


def is_remote(path: Any) -> bool:
    return "://" in str(path)


def expand(text: str) -> str:
    """A path as a person gives it, `~` replaced; other texts as they are.

    Raises UserError: a bucket whose client is not installed, or that has none here.
    """
    scheme = re.match(r"([a-z0-9]+)://", text)
    if not scheme:
        return os.path.expanduser(text)
    if scheme[1] != "gs":
        raise UserError(f"{text}: a local path or gs://BUCKET/... is wanted")
    with contextlib.suppress(ModuleNotFoundError):  # of google.cloud
        if all(map(importlib.util.find_spec, CLIENTS)):
            return text
    raise UserError(f"{text}: buckets need more packages: pip install -e '.[gcs]'")


def patiently(action: Callable[[], Made]) -> Made:
    """Do it, again where it fails. Raises its OSError after three and a half seconds,
    if it still does."""
    for pause in TRIES:
        with contextlib.suppress(OSError):
            return action()
        time.sleep(pause)
    return action()


def stat(path: Any) -> tuple[int, float]:
    """Bytes of a file and when it was changed. Raises OSError: there is none.

    etils' own looks up the owner's name, who may have none (containers, NFS).
    """
    if is_remote(path):
        found = path.stat()
        return found.length or 0, found.mtime or 0.0
    local = os.stat(path)
    return local.st_size, local.st_mtime


def sha256(path: Any) -> str:
    """Digest of a file, hexadecimal."""
    with epath.Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(name: str, path: epath.Path) -> None:
    backend.fsspec_backend.fs(path).put_file(name, str(path))


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[IO[bytes]]:
    """A file to write and to seek in; at the end it has its name, or there is none."""
    if is_remote(path):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            _upload(file.name, path)
        return
    fresh = path.parent / f"{path.name}.tmp"
    try:
        with fresh.open("wb") as file:
            yield file
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def new_file(text: str, *suffixes: str) -> epath.Path:
    """The path of a file to be made; its folder is made now.

    Raises UserError: it exists, has another suffix, or can have no such folder.
    """
    path = epath.Path(text)
    if path.suffix not in suffixes:
        raise UserError(f"{text}: must end in {' or '.join(suffixes)}")
    if path.exists():
        raise UserError(f"{text}: exists already: remove it or use another")
    with explained(f"{text}: its folder cannot be made", "use another", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_whole(path: Any, text: str) -> None:
    """Write a small file, all of it or nothing. Raises OSError as `patiently`."""

    def write() -> None:
        with whole_file(epath.Path(path)) as file:
            file.write(text.encode())

    patiently(write)


class Appended:
    """A file that grows, kept if it is there. In a bucket it is written anew each time,
    but not within `pause` seconds; `close` writes the rest.

    Raises OSError as `patiently`.
    """

    def __init__(self, path: epath.Path, pause: float = 0.0) -> None:
        self._path, self._pause, self._written = path, pause, 0.0
        self._file: IO[bytes]
        if is_remote(path):
            self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
            if path.exists():
                self._file.write(patiently(path.read_bytes))
        else:
            self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        if time.monotonic() - self._written >= self._pause:
            self._finish()

    def close(self) -> None:
        self._finish()
        self._file.close()

    def _finish(self) -> None:
        if is_remote(self._path):
            patiently(lambda: _upload(self._file.name, self._path))
            self._written = time.monotonic()


def write_json(path: Any, facts: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def read_json(path: Any) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none to be read."""
    kinds = OSError, ValueError, RecursionError
    with explained(f"{path} cannot be read", kinds=kinds):
        found: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
