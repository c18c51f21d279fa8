"""Several processes as one job: TPU pods, SLURM, Open MPI, or addresses by hand."""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra2_jax.errors import RESTART, UserError, leave

# JAX aborts a process that finds another one lost; we say more, and come first.
MARGIN_SECONDS = 60
SIGNS, LOST = "sra2_jax/signs", "sra2_jax/lost"


def initialize(arguments: argparse.Namespace) -> None:
    """Join the other processes, if the flags ask for it, before any device is used.

    Ends the process with status 42 if the others do not come in time.

    Raises:
      UserError: flags that do not belong together, or no cluster to be found.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num_processes and --process_id go together")
    if not (arguments.distributed or all(given)):
        return
    seconds = arguments.join_seconds
    who = "this process" if not all(given) else "process {2} of {1}".format(*by_hand)
    where = f" at {arguments.coordinator}" if all(given) else ""
    # JAX would abort, with no word on what to do.
    late = threading.Timer(
        seconds,
        leave,
        (
            f"stopped: {who} waited {seconds} s for the others{where}: start all of "
            "them, or mend the address",
            RESTART,
        ),
    )
    late.daemon = True
    late.start()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            *by_hand,
            initialization_timeout=seconds + MARGIN_SECONDS,
            heartbeat_timeout_seconds=arguments.heartbeat_seconds + MARGIN_SECONDS,
        )
        # JAX's own handler, for its preemption service, would swallow the signal.
        signal.signal(signal.SIGTERM, terminated)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes did not come together ({reason}): outside of a TPU pod, "
            "SLURM and Open MPI give --coordinator=HOST:PORT, --num_processes=N and "
            "--process_id=I"
        ) from error
    finally:
        late.cancel()


def anywhere(mesh: Mesh) -> Callable[[bool], Any]:
    """A function that says whether something is true on any process: of a bool, a bool
    on one process, and on several, which call it together, an array not waited for."""
    if jax.process_count() == 1:
        return bool
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def of(value: bool) -> Any:
        local = np.full(jax.local_device_count(), value, np.int32)
        return largest(jax.make_array_from_process_local_data(split, local))

    return of


class Signs:
    """Signs of life of all processes, in the table that JAX's coordinator keeps.

    Process 0 looks at all of them, the others at process 0 and what it says.

    Args:
      seconds: without a sign until a process counts as lost.
    """

    def __init__(self, seconds: float) -> None:
        # Not public, and used by Orbax for its barriers as well.
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        self._seconds, self._index = seconds, jax.process_index()
        self._who = (
            f"process {self._index} (host {socket.gethostname()}, pid {os.getpid()})"
        )
        self._count = 0
        self._seen: dict[str, tuple[str, float]] = {}  # text, when it changed

    def give(self, doing: str, mistake: bool = False, ended: str = "") -> None:
        """Say what this process is doing, or with what it ends, by a user's mistake or
        for another reason."""
        self._count += 1
        sign = {"who": self._who, "n": self._count, "doing": doing}
        sign |= {"mistake": mistake, "ended": ended}
        name, text = f"{SIGNS}/{self._index}/sign", json.dumps(sign)
        self._client.key_value_set(name, text, allow_overwrite=True)

    def lost(self) -> tuple[str, bool]:
        """Who has ended, or has given no sign in time, "" if all are well; and whether
        that was a user's mistake."""
        if self._index:
            said = self._client.key_value_dir_get(LOST)
            return tuple(json.loads(said[0][1])) if said else self._gone(self._signs(0))
        found = self._gone(self._signs())
        if found[0]:
            text = json.dumps(found)
            self._client.key_value_set(f"{LOST}/0", text, allow_overwrite=True)
        return found

    def all(self) -> list[str]:
        """A line for each process: what it is doing."""
        signs = [json.loads(text) for _, text in self._signs()]
        return [f"{sign['who']}: {sign['doing']}" for sign in signs]

    def meet(self, seconds: float) -> None:
        """Wait for all the others, so long at most: process 0 takes the table, without
        which JAX aborts, with it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier("sra2_jax/end", int(1000 * seconds))
        if self._index == 0:
            time.sleep(1)

    def _signs(self, index: int | str = "") -> list[tuple[str, str]]:
        """(key, text) of a process, or of all."""
        return sorted(self._client.key_value_dir_get(f"{SIGNS}/{index}".rstrip("/")))

    def _gone(self, signs: Sequence[tuple[str, str]]) -> tuple[str, bool]:
        now = time.monotonic()
        for name, text in signs:
            if self._seen.get(name, ("", 0.0))[0] != text:
                self._seen[name] = text, now
            sign, quiet = json.loads(text), now - self._seen[name][1]
            if sign["ended"]:
                return f"{sign['who']} has ended: {sign['ended']}", sign["mistake"]
            if quiet > self._seconds:
                silence = f"has given no sign of life for {quiet:.0f} s"
                return f"{sign['who']} {silence}", False
        return "", False


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
