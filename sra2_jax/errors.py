"""The one exception that a person, not a programmer, is meant to read."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: a config value, a file, a folder.

    The message is one line: what is wrong, where, and what to do.
    """


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main and exit with its status.

    A `UserError` becomes one line, `error: ...`, and status 2, without a traceback.
    """
    try:
        status = main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        # At once: on their way out the libraries' threads print thousands of lines
        # about the same error, or hang.
        os._exit(2)
    sys.exit(status)
