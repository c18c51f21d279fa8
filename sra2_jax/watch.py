"""Looks after a run from a thread: signals, stalls, processes that are lost."""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import jax

from sra2_jax.distributed import Signs
from sra2_jax.errors import MISTAKE, RESTART, UserError, leave

# Phases in which a run has nothing that its last checkpoint has not.
NOTHING_TO_SAVE = ("start", "compile")
PATIENCE_SECONDS = 15  # after SIGTERM, for data that others wait for as well
ROUND_SECONDS = 2.0  # of signs of life


class Stop(Exception):
    """A signal has come: save and end."""


class Watch:
    """What the training loop tells where it is, and asks whether to stop.

    Used as a context manager it starts the thread; without, `Watch()` only takes
    notes. SIGTERM and the first Ctrl-C, from then on, set `stopping`; while there is
    nothing to save yet SIGTERM ends the process with status 42. No progress for
    `stall_seconds` writes the stacks of all threads and ends it with 42, too; so does
    a lost process.

    Args:
      stall_seconds: allowed between two calls of `progress`.
      heartbeat_seconds: without a sign of life until another process is lost.
    """

    def __init__(
        self, stall_seconds: float = float("inf"), heartbeat_seconds: float = 100.0
    ) -> None:
        self.stopping = ""  # by what
        self._stall = stall_seconds
        self._heartbeat = heartbeat_seconds
        self._phase, self._since = "start", time.monotonic()
        self._interruptible = False
        self._signs: Signs | None = None

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
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs a handler when the main thread is free; the pipe is written at
        # once.
        self._before = {
            number: signal.signal(number, self._signalled)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if jax.process_count() > 1:
            self._signs = Signs(self._heartbeat)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread ends
        self._thread.join()
        os.close(self._read)
        if self._signs and error:
            self._part(self._signs, error)

    def _part(self, signs: Signs, error: BaseException) -> None:
        """Tell the other processes why this one ends, unless all of them do."""
        if self.stopping:
            signs.meet(PATIENCE_SECONDS)
            return
        told = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" not in told:
            # A collective that fails means that another process is lost: who?
            for _ in range(int(self._heartbeat / ROUND_SECONDS) + 2):
                self._exchange(signs)
                time.sleep(ROUND_SECONDS)
        signs.give("end", isinstance(error, UserError), told[:500])
        self._linger()

    @staticmethod
    def _linger() -> None:
        """Until the others have read the table, which process 0 takes with it."""
        if jax.process_index() == 0:
            time.sleep(2 * ROUND_SECONDS)

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
        next_round, told = 0.0, None
        while True:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            if ready:
                numbers = os.read(self._read, 64)
                if not numbers:
                    return
                if signal.SIGTERM in numbers:
                    told = time.monotonic()
            self._check_stop(told)
            self._check_stall()
            if self._signs and time.monotonic() > next_round:
                self._exchange(self._signs)
                next_round = time.monotonic() + ROUND_SECONDS

    def _check_stop(self, told: float | None) -> None:
        if told is None:
            return
        now = time.monotonic()
        starving = self._phase == "data" and now - self._since > PATIENCE_SECONDS
        if self._phase in NOTHING_TO_SAVE or (
            starving and now - told > PATIENCE_SECONDS
        ):
            leave(
                f"stopped: SIGTERM ({self._phase}): run the same command again to go "
                "on from the last checkpoint",
                RESTART,
            )

    def _check_stall(self) -> None:
        quiet = time.monotonic() - self._since
        if quiet < self._stall:
            return
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        for line in self._signs.all() if self._signs else []:
            print(line, file=sys.stderr)
        leave(
            f"stopped: no progress for {quiet:.0f} s ({self._phase}), see the stacks "
            "above: run the same command again to go on from the last checkpoint",
            RESTART,
        )

    def _exchange(self, signs: Signs) -> None:
        quiet = time.monotonic() - self._since
        try:
            signs.give(f"{self._phase} for {quiet:.0f} s")
            lost, mistake = signs.lost()
        except jax.errors.JaxRuntimeError as error:
            # Process 0 keeps the table.
            said = " ".join(str(error).split())[:100]
            lost, mistake = f"process 0 cannot be reached ({said})", False
        if lost:
            self._linger()
            if mistake:
                leave(f"error: {lost}", MISTAKE)
            leave(
                f"stopped: {lost}: run the same command again on all processes to go "
                "on from the last checkpoint",
                RESTART,
            )
