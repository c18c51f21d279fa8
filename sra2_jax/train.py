"""The training job: open, restore, and the loop, on one screen each."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jax
from jax.experimental import multihost_utils

from sra2_jax import runtime
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Config
from sra2_jax.data.pipeline import Order, batches, prefetch_to_device
from sra2_jax.data.prepare import prepare
from sra2_jax.errors import RESTART, Restart, UserError, one_line
from sra2_jax.log import Guard, Log
from sra2_jax.observe import Observer
from sra2_jax.run import Run
from sra2_jax.runtime import Stop, Watch
from sra2_jax.sharding import batch_sharding, make_mesh
from sra2_jax.step import Program, State


def train(config: Config, workdir: str, watch: Watch | None = None) -> None:
    """Run the whole job in `workdir`, from its newest checkpoint on if it has one.

    Args:
      watch: looks after the run; None: nobody does.

    Raises:
      UserError: anything in the config, the data or the folder that a person must mend.
      Restart: SIGTERM, with the last finished step saved; a save that failed; another
        process that is lost. KeyboardInterrupt: Ctrl-C, as SIGTERM.
    """
    watch = watch or Watch()
    program = Program(config, make_mesh(config.mesh))
    run = Run(workdir, jax.process_index() == 0)
    run.claim(config, runtime.versions())
    runtime.keep_compiled(run.compiled)
    dataset = prepare(config, run.latents(config), program.fields, watch)
    run.claim_dataset(dataset.folder, dataset.sha256)
    with ExitStack() as stack:
        log = stack.enter_context(Log(run, config))
        checkpoints = Checkpoints(run, config.run, log.score, log.report)
        stack.enter_context(checkpoints)
        latest = checkpoints.latest() or 0
        if latest > config.steps:
            raise UserError(
                f"{run.checkpoints} is at step {latest}, beyond config.steps="
                f"{config.steps}: raise it or use another --workdir"
            )
        if latest == config.steps and run.finished(latest):
            print(f"{run}: finished at step {latest} already: nothing to do")
            return
        newest = checkpoints.restore_newest(program.abstract)
        start, state, unlogged = newest or (0, program.start(), ())
        log.restart(start, unlogged)
        if start != latest:
            log.event(start, "restored", instead_of=latest)
        watch.progress("compile")
        with log.paused():
            observer = Observer(program, run, log, dataset.folder, watch)
            frozen = program.load_frozen()
            began = time.perf_counter()
            step = program.compile()
            seconds = time.perf_counter() - began
        run.write("run", facts(program, seconds) | {"latents": dataset.facts()})
        log.message(f"{run}: step {start} of {config.steps}, compile {seconds:.1f} s")
        rows = batches(
            dataset.folder,
            Order.of(config),
            start,
            program.fields,
            jax.process_index(),
            jax.process_count(),
        )
        place = batch_sharding(program.mesh)
        with prefetch_to_device(rows, place) as ready:
            loop = Loop(program, step, frozen, state, log, checkpoints, observer, watch)
            loop.run(ready)
        log.message(f"done: {run.report}")


def facts(program: Program, seconds: float) -> dict[str, Any]:
    """What the report says of the run besides its config."""

    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    params = program.abstract.params
    parameters = {"network": count(params["network"]), "heads": count(params["heads"])}
    parameters["encoder"] = count(program.frozen)
    methods = [
        {"name": name, "title": a.title, "aim": a.aim, "depth": a.depth}
        for name, a in program.alignments.items()
    ]
    seconds = round(seconds, 2)
    return {"methods": methods, "parameters": parameters, "compile_seconds": seconds}


class Loop:
    """Steps until config.steps; all processes run it alike.

    Step k is dispatched before the metrics of k - 1 are read, so the device never waits
    for the host, and all processes see a stop at the same step.

    Args:
      step: compiled, (state, batch, frozen) -> (state, metrics).
    """

    def __init__(
        self,
        program: Program,
        step: Any,
        frozen: Any,
        state: State,
        log: Log,
        checkpoints: Checkpoints,
        observer: Observer,
        watch: Watch,
    ) -> None:
        self._config, self._update, self._frozen = program.config, step, frozen
        self._state, self._step = state, int(state.step)
        self._log, self._checkpoints = log, checkpoints
        self._observer, self._watch = observer, watch
        self._guard = Guard(program.config.run.most_skipped, log)
        self._anywhere = runtime.anywhere(program.mesh)
        self._pending: Any = None  # step, metrics and record ids not read yet

    def run(self, batches: Iterator[dict[str, jax.Array]]) -> None:
        """All steps, then the last samples and the report. Raises as `train`."""
        steps, resumed = self._config.steps, 0 < self._step < self._config.steps
        try:
            if resumed:
                with self._log.paused():
                    self._observer.observe(self._step, self._ema, resumed=True)
            while self._step < steps:
                with self._watch.interruptible("data"):
                    batch = next(batches)
                self._advance(batch)
            self._observer.finish(steps, self._ema)
        except Stop:
            self._stop()
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            raise Restart(
                f"another process is lost ({one_line(error)}): {runtime.AGAIN}"
            ) from error

    @property
    def _ema(self) -> Any:
        return self._state.ema["network"]

    def _advance(self, batch: dict[str, jax.Array]) -> None:
        """One step, and what is due after it. Raises Stop on all processes at once."""
        config, observer = self._config, self._observer
        self._watch.progress("step")
        index = batch.pop("index")
        self._state, metrics = self._update(self._state, batch, self._frozen)
        self._step += 1
        metrics["stop"] = self._anywhere(bool(self._watch.stopping))
        stop = self._read()
        self._pending = self._step, metrics, index

        last = self._step == config.steps
        if self._step % config.run.log_every == 0:
            self._checkpoints.check()
        saving = last or self._step % config.run.checkpoint_every == 0
        observing = not last and any(observer.due(self._step))
        if saving or observing:
            stop = self._read() or stop
            with self._log.paused():
                if saving:  # first: scoring may take long, and be cut off
                    self._save()
                if observing:
                    observer.observe(self._step, self._ema)
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
        self._checkpoints.save(self._step, self._state, self._log.unlogged)

    def _stop(self) -> None:
        """Save and end, all processes together."""
        self._read()
        self._save()
        self._checkpoints.wait()
        line = f"step {self._step} is saved: the same command goes on from there"
        if self._watch.stopping == "Ctrl-C":
            self._log.message(line)
            raise KeyboardInterrupt
        runtime.part(f"stopped: {line}", RESTART)
        raise Restart(line)
