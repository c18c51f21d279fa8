"""What a person is told when a program ends early, and the exit status it ends with.

Exit statuses of every program here: 0 done; 1 checked, and not good; 2 a mistake that a
person must mend; 42 stopped by circumstances, the same command goes on from there; 130
Ctrl-C. 134 is JAX's own: a process that lost another one, as good as 42.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

MISTAKE, RESTART, INTERRUPTED = 2, 42, 130


class UserError(ValueError):
    """Something the user can mend: a config value, a file, a folder.

    The message is one line: what is wrong, where, and what to do.
    """


class Restart(Exception):
    """The program was stopped and is worth starting again, as it was."""


def one_line(error: BaseException) -> str:
    """The kind of an error and what was said at its root, in one line."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def explained(
    what: object,
    advice: str = "",
    kinds: type[BaseException] | tuple[type[BaseException], ...] = Exception,
) -> Iterator[None]:
    """An error of these kinds inside becomes the UserError "WHAT (ERROR): ADVICE"; what
    is one already stays as it is."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        end = f": {advice}" if advice else ""
        raise UserError(f"{what} ({one_line(error)}){end}") from error


def leave(line: str, status: int) -> NoReturn:
    """Print a line, if not empty, and end at once, from any thread.

    On their way out the libraries' threads would print thousands of lines about the
    same error, or hang.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, line and f"{line}\n")):
        with contextlib.suppress(OSError):  # nobody listens, or the disk is full
            stream.write(text)
            stream.flush()
    os._exit(status)
