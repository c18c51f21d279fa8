"""The training job: open, restore, and the loop, on one screen each."""

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from sra2_jax import runtime
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.chips import chip_of
from sra2_jax.config import Config
from sra2_jax.config_file import no_latents
from sra2_jax.data import pipeline
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.data.order import Order
from sra2_jax.data.records import ENCODE, FILE, LatentsInfo, check
from sra2_jax.errors import RESTART, Restart, UserError, one_line
from sra2_jax.log import Guard, Log, Profile
from sra2_jax.observe import Observer
from sra2_jax.run import Run
from sra2_jax.runtime import Stop, Watch
from sra2_jax.sharding import batch_sharding, mesh
from sra2_jax.step import Program, State, count_parameters
from sra2_jax.storage import sha256
from sra2_jax.weights import describe_vae


def train(config: Config, workdir: str, watch: Watch | None = None) -> None:
    """Run the whole job in `workdir`, from its newest checkpoint on if it has one.

    watch: looks after the run; None: nobody does.

    Raises UserError: anything in the config, the data or the folder that a person must
    mend; Restart: SIGTERM, with the last finished step saved; a save that failed;
    another process that is lost. KeyboardInterrupt: Ctrl-C, as SIGTERM.
    """
    watch = watch or Watch()
    run = Run(workdir, jax.process_index() == 0)
    folder = run.latents(config)
    config = with_statistics(config, folder)
    program = Program(config, mesh(config))
    run.claim(config, runtime.versions())
    runtime.keep_compiled(run.compiled)
    dataset = prepare(config, folder, program.fields, watch)
    run.claim_dataset(folder, dataset["sha256"])
    with ExitStack() as stack:
        log = stack.enter_context(Log(run, config, mfu(program)))
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
            observer = Observer(program, run, log, folder, watch)
            frozen = program.load_frozen()
            began = time.perf_counter()
            step = program.compile(frozen)
            seconds = time.perf_counter() - began
        own = facts(program, seconds) | observer.facts
        run.write("run", own | {"latents": dataset})
        log.message(f"{run}: step {start} of {config.steps}, compile {seconds:.1f} s")
        with closing(batches(config, program, start, folder)) as ready:
            profile = Profile(run, config)
            parts = log, checkpoints, observer, watch, profile
            Loop(program, step, state, *parts).run(ready)
        log.message(f"done: {run.report}")


def with_statistics(config: Config, folder: epath.Path) -> Config:
    """The config with the statistics by channel of a dataset, or of the VAE that is to
    encode it, where they have some and the config none."""
    if config.latents.mean:
        return config
    if (folder / FILE).exists():
        info = LatentsInfo.read(folder)
        mean, std = info.channel_mean, info.channel_std
    elif config.data.images:
        vae = describe_vae(config.vae)[1].config
        mean, std = vae.latents_mean, vae.latents_std
    else:
        return config
    if len(mean) != config.latents.channels:
        return config
    return config.override({"latents.mean": mean, "latents.std": std})


def prepare(
    config: Config, folder: epath.Path, fields: Sequence[str], watch: Watch
) -> dict[str, Any]:
    """See that a run's dataset, with these fields besides latents and labels, is in
    `folder`; encodes config.data.images where it is missing. Returns what run.json
    says of it.

    Raises UserError: no dataset and no images, or one that contradicts the config.
    """
    if not (folder / FILE).exists():
        if not config.data.images:
            raise no_latents(folder)
        if jax.process_count() > 1:
            line = f"no latents dataset in {folder}: encode it on one machine first"
            raise UserError(f"{line} ({ENCODE})")
        encoder = next((s.model for s in config.feature_readers().values()), "")
        options = EncodeOptions(
            out=str(folder),
            vae=config.vae,
            resolution=config.data.resolution,
            images=config.data.images,
            store_images="image" in fields,
            captions="txt" if config.text.encoder else "",
            text_encoder=config.text.encoder,
            encoder=encoder,
            grid=config.grid if encoder else 0,
        )
        encode(options, lambda count: watch.progress("start"))
    info = LatentsInfo.read(folder)
    check(info, folder, config, fields)
    return {
        "folder": str(folder),
        "sha256": sha256(folder / FILE),
        "num_examples": info.num_examples,
        "scaling_factor": info.scaling_factor,
        "mean": info.latent_mean,
        "std": info.latent_std,
    }


def batches(
    config: Config, program: Program, start: int = 0, folder: Any = None
) -> Generator[dict[str, jax.Array]]:
    """Batches of steps start + 1 ... config.steps on the devices, read ahead.

    folder: of the dataset, config.data.dir by default.

    Raises UserError: as `data.pipeline.batches`.
    """
    order, process = Order.of(config), (jax.process_index(), jax.process_count())
    folder = folder or config.data.dir
    check(LatentsInfo.read(folder), folder, config, program.fields)
    rows = pipeline.batches(folder, order, start, program.fields, *process)
    rows = itertools.islice(rows, config.steps - start)
    return pipeline.prefetch_to_device(rows, batch_sharding(program.mesh))


def mfu(program: Program) -> float:
    """Of one image a second: its FLOPs by formula over the devices' nominal peak; 0
    where that is not known."""
    chip = chip_of(program.mesh.devices.flat[0].device_kind)
    peak = program.mesh.size * chip.flops if chip else float("inf")
    return program.flops() / program.config.batch_size / peak


def facts(program: Program, seconds: float) -> dict[str, Any]:
    """What the report says of the run besides its config."""
    parts = program.abstract.params | {"encoder": program.frozen}
    methods = [
        {"name": name, "title": a.title, "aim": a.aim, "depth": a.depth}
        for name, a in program.alignments.items()
    ]
    return {
        "methods": methods,
        "parameters": {name: count_parameters(tree) for name, tree in parts.items()},
        "compile_seconds": round(seconds, 2),
    }


@dataclass
class Loop:
    """Steps until config.steps; all processes run it alike.

    Step k is dispatched before the metrics of k - 1 are read, so the device never waits
    for the host, and all processes see a stop at the same step.

    update: the compiled step, (state, batch) -> (state, metrics).
    """

    program: Program
    update: Any
    state: State
    log: Log
    checkpoints: Checkpoints
    observer: Observer
    watch: Watch
    profile: Profile

    def __post_init__(self) -> None:
        self.config, self.step = self.program.config, int(self.state.step)
        self.guard = Guard(self.config.run.most_skipped, self.log)
        self.anywhere = runtime.anywhere(self.program.mesh)
        self.pending: Any = None  # step, metrics and record ids not read yet

    def run(self, batches: Iterator[dict[str, jax.Array]]) -> None:
        """All steps, then the last samples and the report. Raises as `train`."""
        steps = self.config.steps
        try:
            if 0 < self.step < steps:
                with self.log.paused():
                    self.observer.observe(self.step, self.state.ema, resumed=True)
            while self.step < steps:
                with self.watch.interruptible("data"):
                    batch = next(batches)
                self.advance(batch)
            self.observer.finish(steps, self.state.ema)
        except Stop:
            self.stop()
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            line = f"another process is lost ({one_line(error)}): {runtime.AGAIN}"
            raise Restart(line) from error

    def advance(self, batch: dict[str, jax.Array]) -> None:
        """One step, and what is due after it. Raises Stop on all processes at once."""
        self.watch.progress("step")
        self.profile.before(self.step + 1)
        self.state, metrics = self.update(self.state, batch)
        self.step += 1
        self.profile.after(self.step, metrics)
        metrics["stop"] = self.anywhere(bool(self.watch.stopping))
        stop = self.read()
        self.pending = self.step, metrics, batch["index"]

        last = self.step == self.config.steps
        if self.step % self.config.run.log_every == 0:
            self.checkpoints.check()
        saving = last or self.step % self.config.run.checkpoint_every == 0
        observing = not last and any(self.observer.due(self.step))
        if saving or observing:
            stop = self.read() or stop
            with self.log.paused():
                if saving:  # first: scoring may take long, and be cut off
                    self.save()
                if observing:
                    self.observer.observe(self.step, self.state.ema)
                if saving:
                    self.observer.report()
        if stop:
            raise Stop

    def read(self) -> bool:
        """Take the metrics of the step before; whether SIGTERM had come by then."""
        if self.pending is None:
            return False
        (step, metrics, index), self.pending = self.pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        stop = values.pop("stop")

        def records() -> list[int]:
            return multihost_utils.process_allgather(index, tiled=True).tolist()

        self.guard.check(step, values, records)
        self.log.step(step, values)
        return bool(stop)

    def save(self) -> None:
        self.watch.progress("save")
        self.checkpoints.save(self.step, self.state, self.log.unlogged)

    def stop(self) -> None:
        """Save and end, all processes together."""
        self.read()
        self.save()
        self.checkpoints.wait()
        line = f"step {self.step} is saved: the same command goes on from there"
        if self.watch.stopping == "Ctrl-C":
            self.log.message(line)
            raise KeyboardInterrupt
        runtime.part(f"stopped: {line}", RESTART)
        raise Restart(line)
