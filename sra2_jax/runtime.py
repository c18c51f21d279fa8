"""The process and its machine: several processes as one job, signals, stalls,
versions, TensorFlow kept off the GPUs."""

import argparse
import faulthandler
import functools
import importlib.metadata
import os
import platform
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sra2_jax
from sra2_jax.errors import RESTART, UserError, explained, leave

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu")
# Phases in which a run has nothing that its last checkpoint has not.
NOTHING_TO_SAVE = ("start", "compile")
PATIENCE_SECONDS = 15  # after SIGTERM, for data that others wait for as well
AGAIN = "run the same command again to go on from the last checkpoint"


def join(arguments: argparse.Namespace) -> None:
    """Join the other processes, if the flags ask for it, before any device is used.

    Ends the process with status 42 if the others do not come in time. Raises UserError:
    flags that do not belong together, or no cluster to be found.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    missing = by_hand.count(None)
    if missing in (1, 2):
        raise UserError("--coordinator, --num_processes and --process_id go together")
    if missing and not arguments.distributed:
        return
    seconds, who, where = arguments.join_seconds, "this process", ""
    if not missing:
        who, where = "process {2} of {1}".format(*by_hand), f" at {by_hand[0]}"
    line = f"stopped: {who} waited {seconds} s for the others{where}: start all of them"
    # JAX would abort, a minute later, with no word on what to do.
    late = threading.Timer(seconds, leave, (f"{line}, or mend the address", RESTART))
    late.daemon = True
    late.start()
    terminated = signal.getsignal(signal.SIGTERM)
    advice = (
        "outside of a TPU pod, SLURM and Open MPI give --coordinator=HOST:PORT, "
        "--num_processes=N and --process_id=I"
    )
    kinds = ValueError, RuntimeError
    try:
        with explained("the processes did not come together", advice, kinds):
            jax.distributed.initialize(
                *by_hand,
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=arguments.heartbeat_seconds,
            )
        # JAX's own handler, for its preemption service, would swallow the signal.
        signal.signal(signal.SIGTERM, terminated)
    finally:
        late.cancel()


def part(line: str = "", status: int = 0) -> None:
    """End this process, one of several, once all of them have come to their end; a
    process alone is left to go on.

    At once: while TensorFlow's and JAX's threads are torn down a process may crash, and
    one crashed process fails the whole job.
    """
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        leave(line, status)


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


def agree(text: str) -> str:
    """The text of the first process that has one; "" if none has. Called by all."""
    if jax.process_count() == 1:
        return text
    row = np.frombuffer(text.encode()[:256].ljust(256, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(row)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, texts), "")


class Stop(Exception):
    """A signal has come: save and end."""


class Watch:
    """What the training loop tells where it is, and asks whether to stop.

    Used as a context manager it starts a thread; without, `Watch()` only takes notes.
    SIGTERM and the first Ctrl-C, from then on, set `stopping`; while there is nothing
    to save yet SIGTERM ends the process with status 42. No progress for `stall_seconds`
    writes the stacks of all threads and ends it with 42, too.
    """

    def __init__(self, stall_seconds: float = float("inf")) -> None:
        self.stopping = ""  # by what
        self._stall = stall_seconds
        self._phase, self._since = "start", time.monotonic()
        self._interruptible = False

    def progress(self, phase: str) -> None:
        """The run goes on, with `phase`: start, compile, data, step, save, sample."""
        self._phase, self._since = phase, time.monotonic()

    @contextmanager
    def interruptible(self, phase: str) -> Iterator[None]:
        """A wait that SIGTERM ends with `Stop`; on several processes it does not."""
        self.progress(phase)
        alone = jax.process_count() == 1
        if alone and self.stopping:
            raise Stop
        self._interruptible = alone
        try:
            yield
        finally:
            self._interruptible = False

    def __enter__(self) -> Self:
        # Python runs a handler when the main thread is free; the pipe is written at
        # once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        both = signal.SIGTERM, signal.SIGINT
        self._before = {
            number: signal.signal(number, self._signalled) for number in both
        }
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread ends
        self._thread.join()
        os.close(self._read)

    def _signalled(self, number: int, _: object) -> None:
        self.stopping = "SIGTERM"
        if number == signal.SIGINT:
            self.stopping = "Ctrl-C"
            signal.signal(number, signal.default_int_handler)  # the second ends at once
            if self._phase in NOTHING_TO_SAVE:
                raise KeyboardInterrupt
        if self._interruptible:
            raise Stop

    def _run(self) -> None:
        told = float("inf")  # when SIGTERM came
        while True:
            if select.select([self._read], [], [], 0.5)[0]:
                numbers = os.read(self._read, 64)
                if not numbers:
                    return
                told = time.monotonic() if signal.SIGTERM in numbers else told
            now = time.monotonic()
            phase, quiet = self._phase, now - self._since
            starving = phase == "data" and min(quiet, now - told) > PATIENCE_SECONDS
            if told <= now and (phase in NOTHING_TO_SAVE or starving):
                leave(f"stopped: SIGTERM ({phase}): {AGAIN}", RESTART)
            if quiet > self._stall:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                line = f"no progress for {quiet:.0f} s ({phase}), see the stacks above"
                leave(f"stopped: {line}: {AGAIN}", RESTART)


def keep_compiled(folder: Any) -> None:
    """Compiled programs go to a folder, so that a resumed run starts at once.

    On accelerators: a CPU's are compiled for the very machine. JAX's own setting
    (JAX_COMPILATION_CACHE_DIR) wins.
    """
    name = "jax_compilation_cache_dir"
    if jax.default_backend() != "cpu" and not getattr(jax.config, name):
        jax.config.update(name, str(folder))


@functools.cache
def tensorflow() -> Any:
    """TensorFlow, imported on first use and kept off every GPU.

    The only import of TensorFlow in this package, for TFDS and clu: a GPU that it took
    would be missing to JAX.
    """
    # Its C++ notes would hide our one-line errors; JAX sets "1" where nothing is set.
    # oneDNN, which announces itself, only matters to networks run by TensorFlow.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def versions() -> dict[str, Any]:
    """What a program ran on: packages, commit, devices, date."""
    found: dict[str, Any] = {"sra2_jax": sra2_jax.__version__, "commit": "unknown"}
    git = ["git", "-C", str(Path(sra2_jax.__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL)
        found["commit"] = commit.strip()
    found["python"] = platform.python_version()
    for name in PACKAGES:
        found[name] = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
