"""The one exception that a person, not a programmer, is meant to read."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sra2_jax.xla_flags import set_flags


class UserError(ValueError):
    """Something the user can mend: a config value, a file, a folder.

    The message is one line: what is wrong, where, and what to do.
    """


def writable(text: str) -> Path:
    """argparse's type of a file to write at the end: it complains at the start.

    Raises:
      argparse.ArgumentTypeError: no folder to write it into, or it is a folder.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main, with XLA's flags set, and exit with its status.

    A `UserError` becomes one line, `error: ...`, and status 2, without a traceback;
    Ctrl-C becomes one line and status 130.
    """
    set_flags()
    try:
        status = main()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    sys.exit(status)


def _exit(line: str, status: int) -> NoReturn:
    """Print a line and end at once.

    On their way out the libraries' threads would print thousands of lines about the
    same error, or hang.
    """
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(status)
