"""The training job: check, restore, loop."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.data.pipeline import Order, batches
from sra2_jax.data.prepare import prepare
from sra2_jax.data.records import LatentsInfo
from sra2_jax.errors import UserError
from sra2_jax.log import Log
from sra2_jax.loop import Loop
from sra2_jax.models.dinov2 import DINOv2
from sra2_jax.observe import Observer, finished
from sra2_jax.optim import make_optimizer
from sra2_jax.sharding import make_mesh, replicated
from sra2_jax.state import count_parameters, create_sharded
from sra2_jax.step import batch_shapes, make_step, record_fields
from sra2_jax.watch import Watch
from sra2_jax.weights import load_dinov2
from sra2_jax.workdir import check_dataset, claim_workdir, write_whole


def load_encoder(config: ConfigDict, mesh: Mesh) -> tuple[DINOv2 | None, Any]:
    """The encoder that an alignment runs in the step, with its parameters on every
    device; (None, None) where none does.

    Raises:
      UserError: it cannot be loaded, or its tokens have another width.
    """
    if "image" not in record_fields(config):
        return None, None
    spec = config.align.encoder
    encoder, params = load_dinov2(spec.model)
    if encoder.config.hidden_size != spec.width:
        raise UserError(
            f"{spec.model} has tokens of width {encoder.config.hidden_size}: set "
            "config.align.encoder.width to it"
        )
    return encoder, jax.device_put(params, replicated(mesh))


def compile_step(
    config: ConfigDict,
    transform: Any,
    schedule: Any,
    mesh: Mesh,
    abstract: Any,
    encoder: DINOv2 | None,
    encoder_params: Any,
) -> tuple[Any, float]:
    """The compiled step, (state, batch) -> (state, metrics), and the seconds it took;
    it cannot recompile later."""
    began = time.perf_counter()
    step = make_step(config, transform, schedule, mesh, abstract, encoder)
    batch = batch_shapes(config, mesh)
    compiled = step.lower(abstract, batch, encoder_params).compile()
    seconds = time.perf_counter() - began
    return lambda state, batch: compiled(state, batch, encoder_params), seconds


def write_facts(
    workdir: epath.Path,
    abstract: Any,
    encoder_params: Any,
    seconds: float,
    folder: epath.Path,
    info: LatentsInfo,
    dataset: str,
) -> None:
    """run.json: what the report says of the run besides its config.

    folder, info, dataset: of the latents, and the SHA-256 of their description.
    """
    facts = {
        "parameters": {
            "network": count_parameters(abstract.params["network"]),
            "heads": count_parameters(abstract.params["heads"]),
            "encoder": count_parameters(encoder_params),
        },
        "compile_seconds": round(seconds, 2),
        "latents": {
            "folder": str(folder),
            "sha256": dataset,
            "num_examples": info.num_examples,
            "scaling_factor": info.scaling_factor,
            "mean": info.latent_mean,
            "std": info.latent_std,
        },
    }
    if jax.process_index() == 0:
        write_whole(workdir / "run.json", json.dumps(facts, indent=2) + "\n")


def keep_compiled(folder: epath.Path) -> None:
    """Compiled programs go to a folder, so that a resumed run starts at once.

    On accelerators: a CPU's are compiled for the very machine. JAX's own setting
    (JAX_COMPILATION_CACHE_DIR) wins.
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if jax.default_backend() != "cpu" and not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def train(config: ConfigDict, workdir: str, watch: Watch | None = None) -> None:
    """Run the whole job in `workdir`, from its newest checkpoint on if it has one.

    Args:
      watch: looks after the run; None: nobody does.

    Raises:
      UserError: anything in the config, the data or the folder that a person must mend.
      Restart: SIGTERM; the last finished step is saved.
    """
    watch = watch or Watch()
    configuration.check(config)
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size, n=config.accumulate)
    folder = epath.Path(workdir).absolute()
    claim_workdir(config, folder)
    keep_compiled(folder / "compiled")
    data, info = prepare(
        config,
        folder,
        record_fields(config),
        lambda done, total: watch.progress("start"),
    )
    dataset = check_dataset(folder, data)

    transform, schedule = make_optimizer(**config.optim)
    abstract, init = create_sharded(config, transform, mesh)
    with ExitStack() as stack:
        checkpoints = Checkpoints(
            folder / "checkpoints",
            config.run.keep_checkpoints,
            keep_every=config.run.keep_every,
            keep_best=config.run.keep_best,
        )
        stack.callback(checkpoints.close)
        latest = checkpoints.latest() or 0
        if latest > config.steps:
            raise UserError(
                f"{checkpoints.folder} is at step {latest}, beyond config.steps="
                f"{config.steps}: raise it or use another --workdir"
            )
        if latest == config.steps and finished(folder, latest):
            print(f"{folder}: finished at step {latest} already: nothing to do")
            return
        newest = checkpoints.restore_newest(abstract)
        start, state, unlogged = newest or (0, init(), ())
        log = Log(
            folder,
            start=start,
            steps=config.steps,
            batch_size=config.batch_size,
            log_every=config.run.log_every,
            unlogged=unlogged,
        )
        stack.callback(log.close)
        if start != latest:
            log.event(start, "restored", instead_of=latest)
        checkpoints.score, checkpoints.report = log.score, log.report
        watch.progress("compile")
        with log.paused():
            observer = Observer(config, folder, mesh, log)
            reference = observer.references(data)
            encoder = load_encoder(config, mesh)
            step, seconds = compile_step(
                config, transform, schedule, mesh, abstract, *encoder
            )
            write_facts(folder, abstract, encoder[1], seconds, data, info, dataset)
        log.message(
            f"{folder}: step {start} of {config.steps}, compile {seconds:.1f} s"
        )
        loop = Loop(
            config,
            step,
            mesh,
            log=log,
            checkpoints=checkpoints,
            observer=observer,
            watch=watch,
        )
        loop.run(state, start, read(config, data, start), reference)
        log.message(f"done: {folder / 'report.html'}")


def read(
    config: ConfigDict, data: epath.Path, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches of steps start + 1, ..."""
    return batches(
        data,
        Order.of(config),
        start,
        record_fields(config),
        jax.process_index(),
        jax.process_count(),
    )
