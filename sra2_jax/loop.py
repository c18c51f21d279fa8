"""The training loop: steps, and what happens between them."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.data.pipeline import prefetch_to_device
from sra2_jax.distributed import anywhere
from sra2_jax.errors import Restart
from sra2_jax.guard import Guard
from sra2_jax.log import Log
from sra2_jax.observe import Observer
from sra2_jax.sharding import batch_sharding
from sra2_jax.watch import Stop, Watch


class Loop:
    """Steps of a run from `start` on; all processes run it alike.

    Args:
      step_function: compiled, (state, batch) -> (state, metrics).
    """

    def __init__(
        self,
        config: ConfigDict,
        step_function: Any,
        mesh: Mesh,
        *,
        log: Log,
        checkpoints: Checkpoints,
        observer: Observer,
        watch: Watch,
    ) -> None:
        self._config, self._mesh = config, mesh
        self._step_function = step_function
        self._log, self._checkpoints = log, checkpoints
        self._observer, self._watch = observer, watch
        self._guard = Guard(config.run.most_skipped, log)
        self._anywhere = anywhere(mesh)
        self._pending: Any = None  # step, metrics and record ids not read yet
        self._owed = False  # a save, for one that failed
        self._flag: Any = False  # a signal came somewhere, before the batch before

    def run(
        self,
        state: Any,
        start: int,
        stream: Iterator[dict[str, np.ndarray]],
        reference: dict[str, float],
    ) -> None:
        """Steps start + 1 ... config.steps, then the last samples and the report.

        Step k is dispatched before the metrics of k - 1 are read, so the device never
        waits for the host.

        Raises:
          UserError: too many updates skipped, damaged data, a folder that is lost.
          Restart: SIGTERM; KeyboardInterrupt: Ctrl-C. The last step is saved. Restart
            too if a save fails on this one of several processes.
        """
        self._state, self._step = state, start
        steps = self._config.steps
        try:
            if 0 < start < steps:
                with self._log.paused():
                    self._observe(resumed=True)
            with prefetch_to_device(stream, batch_sharding(self._mesh)) as ready:
                while self._step < steps:
                    with self._watch.interruptible("data"):
                        batch = next(ready)
                    self._advance(batch)
            self._observer.finish(steps, self._ema, reference, self._alive)
        except Stop:
            self._watch.stopping = self._watch.stopping or "another process's signal"
            self._read()
            self._save()
            said = f"step {self._step} is saved: the same command goes on from there"
            if not self._checkpoints.wait():
                said = "the same command goes on from the last checkpoint"
            if self._watch.stopping == "Ctrl-C":
                self._log.message(said)
                raise KeyboardInterrupt from None
            raise Restart(said) from None

    @property
    def _ema(self) -> Any:
        return self._state.ema["network"]

    def _advance(self, batch: dict[str, Any]) -> None:
        """One step, and what is due after it. Raises Stop on all processes at once."""
        config, observer = self._config, self._observer
        self._watch.progress("step")
        index = batch.pop("index")
        self._state, metrics = self._step_function(self._state, batch)
        self._step += 1
        metrics["stop"] = self._anywhere(bool(self._watch.stopping))
        stop = self._read()
        self._pending = self._step, metrics, index

        last = self._step == config.steps
        saving = last or self._step % config.run.checkpoint_every == 0
        if not self._step % config.run.log_every:
            self._owed = self._checkpoints.failed() or self._owed
            saving = saving or self._owed
        observing = not last and any(observer.due(self._step))
        if saving or observing:
            stop = self._read() or stop
            with self._log.paused():
                if saving:  # first: scoring may take long, and be cut off
                    self._save()
                if observing:
                    self._observe()
                if saving:
                    observer.report()
        if stop:
            raise Stop

    def _read(self) -> bool:
        """Take the metrics of the step before; whether SIGTERM had come by then."""
        if self._pending is None:
            return False
        (step, metrics, index), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        stop = values.pop("stop")

        def records() -> list[int]:
            return list(map(int, multihost_utils.process_allgather(index, tiled=True)))

        self._guard.check(step, values, records)
        self._log.step(step, values)
        return bool(stop)

    def _save(self) -> None:
        self._watch.progress("save")
        self._owed = not self._checkpoints.save(
            self._step, self._state, self._log.unlogged
        )

    def _observe(self, resumed: bool = False) -> None:
        self._observer.observe(self._step, self._ema, self._alive, resumed=resumed)

    def _alive(self) -> None:
        """Called between batches of samples."""
        self._watch.progress("sample")
        # The flag of the batch before: nobody waits for this one.
        stop, self._flag = self._flag, self._anywhere(bool(self._watch.stopping))
        if stop:
            raise Stop
