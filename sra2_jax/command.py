"""A program on the command line: its flags, its complaints, its exit status.

No jax here: it is slow, and XLA reads its flags before JAX looks for devices.
"""

import argparse
import difflib
import errno
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sra2_jax import config_file
from sra2_jax.config import Config
from sra2_jax.errors import INTERRUPTED, MISTAKE, RESTART, Restart, UserError, leave
from sra2_jax.section import Pairs, allowed, fields

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
# A block of XL/2 is 42 MB in bfloat16: gathered and reduced in one collective each.
# Tried on compiled programs and left out: the latency-hiding scheduler of GPUs (on
# anyway), a larger scoped vmem on TPUs (more traffic), see docs/aot.md.
BYTES = 2**27
GPU_FLAGS = (
    f"--xla_gpu_all_gather_combine_threshold_bytes={BYTES}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={BYTES}",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={BYTES}",
)
# JAX takes 75% of a GPU otherwise; XL/2 without rematerialisation wants more.
MEMORY_FRACTION = "0.92"


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main, with XLA's flags set, and exit with its status.

    A `UserError`, a `Restart`, a disk that fails, SIGTERM and Ctrl-C become one line
    and a status of `errors`, without a traceback. (Training takes over the signals, see
    `runtime.Watch`.)
    """
    set_xla_flags()
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


def set_xla_flags() -> None:
    """Tell XLA what suits this project on GPUs; the environment's own values win."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(importlib.util.find_spec(name) for name in plugins):
        given = os.environ.get("XLA_FLAGS", "")
        # Of a flag given twice XLA takes the last.
        os.environ["XLA_FLAGS"] = " ".join((*GPU_FLAGS, given)).strip()
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)


def writable(text: str) -> Path:
    """argparse's type of a file to write at the end: it complains at the start.

    Raises:
      argparse.ArgumentTypeError: no folder to write it into, or it is a folder.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path


class Parser(argparse.ArgumentParser):
    """argparse's, with its complaints in one line and no abbreviations.

    Raises:
      UserError: by `parse_args` and `parse_known`, a flag that is wrong, unknown, or
        given twice.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known(self) -> tuple[argparse.Namespace, Pairs]:
        """The parser's own flags, and (key, text) of "--config.KEY=VALUE"."""
        own = re.findall(r"(?<!\S)--\w+", self.format_help())
        given = [argument.split("=")[0] for argument in sys.argv[1:]]
        for flag in own:
            if given.count(flag) > 1:  # argparse would take the last
                raise UserError(f"{flag} is given twice: leave one out")
        arguments, rest = self.parse_known_args()
        found = []
        for flag, text in _pairs(rest):
            section, _, key = flag.partition(".")
            if section != "config":
                near = difflib.get_close_matches(f"--{flag}", own, 1, 0.8)
                near += [f"--config.{flag}"] if flag in fields(Config) else []
                hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
                raise UserError(f"unknown flag --{flag}: {hint}")
            found.append((key, text))
        return arguments, found

    def parse(self) -> argparse.Namespace:
        """The flags of a program that has no config."""
        arguments, overrides = self.parse_known()
        if overrides:
            self.error(f"unknown flag --config.{overrides[0][0]}")
        return arguments

    def parse_config(self, default: str) -> tuple[argparse.Namespace, Config]:
        """The parser's own flags, and the config of --config, `default` if there is
        none, and --config.KEY=VALUE; with --keys lists its keys and ends."""
        self.add_argument("--config", default=default, help="file (%(default)s)")
        self.add_argument(
            "--keys", action="store_true", help="list the config's keys and end"
        )
        self.epilog = "Any key of the config: --config.KEY=VALUE. --keys lists them."
        arguments, overrides = self.parse_known()
        file = config_file.read_file(arguments.config)
        config = config_file.override(file, overrides)
        if arguments.keys:
            for name, value in config.flat().items():
                f = fields(Config)[name]
                about = f.metadata["key"].about
                print(f"--config.{name}={value}  {about} ({allowed(f)})")
            sys.exit()
        return arguments, config


def _pairs(arguments: Sequence[str]) -> Pairs:
    """(flag without dashes, value) of "--flag=value" and "--flag", "value"."""
    found: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not re.match(r"--?\w", argument):
            raise UserError(f"unexpected argument {argument!r}: flags begin with --")
        flag, equals, text = argument.lstrip("-").partition("=")
        value: str | None = text if equals else None
        if not equals and rest and not re.match(r"--?[a-z]", rest[0]):
            value = rest.pop(0)
        found.append((flag, value))
    return found


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a process finds the others, see `runtime.join`."""
    add = parser.add_argument
    add(
        "--distributed",
        action="store_true",
        help="one of several processes, found by the environment: TPU pod, SLURM, "
        "Open MPI",
    )
    add("--coordinator", metavar="HOST:PORT", help="of process 0, elsewhere")
    add("--num_processes", type=int, metavar="N", help="with --coordinator")
    add("--process_id", type=int, metavar="I", help="with --coordinator, from 0")
    add(
        "--join_seconds",
        type=int,
        default=300,
        metavar="S",
        help="to wait for the others at the start (%(default)s)",
    )
    add(
        "--heartbeat_seconds",
        type=int,
        default=100,
        metavar="S",
        help="without a sign of life of another until it is lost (%(default)s)",
    )
