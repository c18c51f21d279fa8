"""Flags that several programs have, and their complaints; without jax: it is slow."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sra2_jax.errors import UserError

# How long the others may take to come, and, later, to give a sign of life.
JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 100


class Parser(argparse.ArgumentParser):
    """argparse's, with its complaints in one line and no abbreviations."""

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse_known(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, list[str]]:
    """The parser's own flags, and the arguments "--config.KEY=VALUE" left over.

    Raises:
      UserError: a flag that is none, or one of the parser's own given twice.
    """
    own = re.findall(r"(?<!\S)--\w+", parser.format_help())
    given = [argument.split("=")[0] for argument in sys.argv[1:]]
    for flag in own:
        if given.count(flag) > 1:  # argparse would take the last
            raise UserError(f"{flag} is given twice: leave one out")
    arguments, rest = parser.parse_known_args()
    for flag in (argument.split("=")[0] for argument in rest):
        near = difflib.get_close_matches(flag, own, 1, 0.8)
        if near and not flag.startswith("--config."):
            raise UserError(f"unknown flag {flag}: did you mean {near[0]}?")
    return arguments, rest


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parser's own flags, of a program that has no config.

    Raises:
      UserError: as `parse_known`, and for an argument that is left over.
    """
    arguments, rest = parse_known(parser)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def pairs(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """(flag without dashes, value) of "--flag=value" and "--flag", "value".

    Raises:
      UserError: an argument that is neither.
    """
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
    """The flags that say how a process finds the others, see `distributed`."""
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
        default=JOIN_SECONDS,
        metavar="S",
        help="to wait for the others at the start (%(default)s)",
    )
    add(
        "--heartbeat_seconds",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="S",
        help="without a sign of life of another until it is lost (%(default)s)",
    )
