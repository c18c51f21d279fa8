"""Several processes as one job: TPU pods, SLURM, Open MPI, or addresses by hand."""

import argparse
import os
import sys

import jax

from sra2_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a process finds the others."""
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


def initialize(arguments: argparse.Namespace) -> None:
    """Join the other processes, if the flags ask for it, before any device is used.

    Raises:
      UserError: flags that do not belong together, no cluster to be found, or others
        that do not come.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num_processes and --process_id go together")
    if not (arguments.distributed or all(given)):
        return
    try:
        jax.distributed.initialize(*by_hand)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes did not come together ({reason}): outside of a TPU pod, "
            "SLURM and Open MPI give --coordinator=HOST:PORT, --num_processes=N and "
            "--process_id=I"
        ) from error


def finish() -> None:
    """End this process, one of several, once all of them have come to their end.

    At once: while TensorFlow's and JAX's threads are torn down a process may crash,
    and one crashed process fails the whole job. A process alone is left to go on.
    """
    if jax.process_count() == 1:
        return
    jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
