"""What a person is told when a program ends early, and the exit status it ends with.

Exit statuses of every program here: 0 done; 1 checked, and not good; 2 a mistake that a
person must mend; 42 stopped by circumstances, the same command goes on from there; 130
Ctrl-C. 134 is JAX's own: a process that lost the one that coordinates all.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sra2_jax.xla_flags import set_flags

MISTAKE, RESTART, INTERRUPTED = 2, 42, 130
UNHEARD = 141  # as a shell has it of a program that SIGPIPE ends
# A disk that is full, read-only or broken, a folder that is not ours.
STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
)


class UserError(ValueError):
    """Something the user can mend: a config value, a file, a folder.

    The message is one line: what is wrong, where, and what to do.
    """


class Restart(Exception):
    """The program was stopped and is worth starting again, as it was."""


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

    A `UserError`, a `Restart`, a disk that fails, SIGTERM and Ctrl-C become one line
    and the status above, without a traceback. (Training takes over the signals, see
    training.watch.)
    """
    set_flags()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        leave(f"error: {error}", MISTAKE)
    except Restart as error:
        leave(f"stopped: {error}", RESTART)
    except BrokenPipeError:  # `| head`
        os._exit(UNHEARD)
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        leave(f"error: {where}{error.strerror}: mend it and run again", MISTAKE)
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED)
    sys.exit(status)


def _terminated(*_: object) -> NoReturn:
    leave("stopped by SIGTERM: run the same command again", RESTART)


def leave(line: str, status: int) -> NoReturn:
    """Print a line and end at once, from any thread.

    On their way out the libraries' threads would print thousands of lines about the
    same error, or hang.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        with contextlib.suppress(OSError):  # nobody listens, or the disk is full
            stream.write(text)
            stream.flush()
    os._exit(status)
