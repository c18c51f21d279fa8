"""Checkpoints that cannot be read: what is wrong, and whether they are to blame."""

import re

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sra2_jax.errors import UserError

# Errors that say nothing of what is on the disk: Python's, JAX's (a full device), and
# those that TensorStore puts in words.
ELSEWHERE = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)
WORDS = re.compile("PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED")


class Damaged(Exception):
    """A checkpoint that cannot be read as it was written."""


def unreadable(path: epath.Path, what: str, error: BaseException) -> Exception:
    """Damaged, or UserError where the fault is not in what is on the disk."""
    line = f"{what} cannot be read: {said(error)}"
    if isinstance(_root(error), ELSEWHERE) or WORDS.search(line):
        return UserError(f"checkpoint {path}: {line}: mend it and run again")
    return Damaged(line)


def said(error: BaseException) -> str:
    """What was said at the root of an error, in one line."""
    error = _root(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _root(error: BaseException) -> BaseException:
    while error.__cause__:
        error = error.__cause__  # what TensorStore said
    return error


def agreed(reason: str) -> str:
    """What is wrong on any process, the first one's words; "" on all: nothing."""
    if jax.process_count() == 1:
        return reason
    text = np.zeros(256, np.uint8)
    encoded = reason.encode()[:256]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    for row in multihost_utils.process_allgather(text):
        if row.any():
            return bytes(row).rstrip(b"\0").decode(errors="replace")
    return ""
