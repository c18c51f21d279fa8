"""A program on the command line: its flags, its complaints, its exit status.

No jax here: it is slow, and XLA reads its flags before JAX looks for devices.
"""

import argparse
import difflib
import importlib.util
import io
import os
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from sra2_jax import config_file
from sra2_jax.config import Config
from sra2_jax.errors import INTERRUPTED, MISTAKE, RESTART, Restart, UserError, leave
from sra2_jax.section import allowed, fields, find
from sra2_jax.storage import expand

UNHEARD = 141  # as a shell has it of a program that SIGPIPE ends
# A block of XL/2 is 42 MB in bfloat16: gathered and reduced in one collective each.
# Tried on compiled programs and left out: the latency-hiding scheduler of GPUs (on
# anyway), a larger scoped vmem on TPUs (more traffic), see docs/aot.md.
COMBINED = ("all_gather", "reduce_scatter", "all_reduce")
GPU_FLAGS = [f"--xla_gpu_{c}_combine_threshold_bytes={2**27}" for c in COMBINED]
# JAX takes 75% of a GPU otherwise; XL/2 without rematerialisation wants more.
MEMORY_FRACTION = "0.92"


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's main, with XLA's flags set, and exit with its status.

    Mistakes, failing disks, SIGTERM and Ctrl-C become one line and a status of
    `errors`, without a traceback. (Training takes over the signals, see `runtime`.)
    """
    if sys.flags.optimize > 1:  # -OO, PYTHONOPTIMIZE=2
        leave(
            "error: Python leaves out texts that are needed: run without -OO", MISTAKE
        )
    for stream in (sys.stdout, sys.stderr):  # of terminals that know ASCII alone
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    set_xla_flags()
    logging.set_verbosity(logging.ERROR)  # of libraries' notes
    line = "stopped by SIGTERM: run the same command again"
    signal.signal(signal.SIGTERM, lambda *_: leave(line, RESTART))
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        leave(f"error: {error}", MISTAKE)
    except Restart as error:
        leave(f"stopped: {error}", RESTART)
    except BrokenPipeError:  # `| head`
        os._exit(UNHEARD)
    except OSError as error:  # a disk, a folder, a network
        leave(f"error: {error}: mend it and run again", MISTAKE)
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED)
    sys.exit(status)


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

    Raises argparse.ArgumentTypeError: no folder to write it into, or it is a folder.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path


class Parser(argparse.ArgumentParser):
    """argparse's, with its complaints in one line, no abbreviations, and the keys of
    the config as flags where a program has them.

    Raises UserError: by `parse_args`, a flag that is wrong or unknown.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def add_keys(self) -> None:
        """Flags --config.KEY=VALUE, to be found in `overrides`: {key: text}."""
        self.set_defaults(overrides={})
        for name in fields(Config):
            self.add_argument(f"--config.{name}", default=SUPPRESS, help=SUPPRESS)

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        """The flags. Unlike argparse's it names the flag that was meant, perhaps; and
        `~` is the home directory behind `=` too, where no shell sees it."""
        texts = given[0] if given else sys.argv[1:]
        pairs = (
            text.partition("=") if text[:1] == "-" else ("", "", text) for text in texts
        )
        arguments, rest = self.parse_known_args(
            [f"{flag}{sign}{expand(value)}" for flag, sign, value in pairs]
        )
        if rest:
            flag = rest[0].split("=")[0]
            if not flag.startswith("-"):
                self.error(f"unexpected argument {flag!r}")
            if flag.startswith("--config."):
                find(Config, flag.removeprefix("--config."))
            known = [f"--{name}" for name in vars(arguments)]
            near = difflib.get_close_matches(flag, known, 1, 0.8)
            near += [f"--config.{k}" for k in fields(Config) if f"--{k}" == flag]
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            raise UserError(f"unknown flag {flag}: {hint}")
        for name in [name for name in vars(arguments) if name.startswith("config.")]:
            key, text = name.removeprefix("config."), vars(arguments).pop(name)
            arguments.overrides = arguments.overrides | {key: text}
        return arguments

    def parse_config(self, default: str) -> tuple[argparse.Namespace, Config]:
        """The flags, and the config of --config, `default` if there is none, and
        --config.KEY=VALUE; with --keys lists its keys and ends."""
        self.add_argument("--config", default=default, help="file (%(default)s)")
        self.add_argument(
            "--keys", action="store_true", help="list the config's keys and end"
        )
        self.add_keys()
        self.epilog = "Any key of the config: --config.KEY=VALUE. --keys lists them."
        arguments = self.parse_args()
        config = config_file.override(arguments.config, arguments.overrides)
        if arguments.keys:
            for name, value in config.flat().items():
                f = fields(Config)[name]
                about = f.metadata["key"].about
                print(f"--config.{name}={value}  {about} ({allowed(f)})")
            sys.exit()
        return arguments, config


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a process finds the others, see `runtime.join`."""
    add = parser.add_argument
    found = "one of several processes, found by the environment: TPU pod, SLURM, MPI"
    add("--distributed", action="store_true", help=found)
    add("--coordinator", metavar="HOST:PORT", help="of process 0, elsewhere")
    add("--num_processes", type=int, metavar="N", help="with --coordinator")
    add("--process_id", type=int, metavar="I", help="with --coordinator, from 0")
    wait = "seconds to wait for the others at the start (%(default)s)"
    add("--join_seconds", type=int, default=300, metavar="S", help=wait)
    lost = "seconds without a sign of life until another is lost (%(default)s)"
    add("--heartbeat_seconds", type=int, default=100, metavar="S", help=lost)
