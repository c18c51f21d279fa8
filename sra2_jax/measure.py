"""Timing of training steps on made-up batches, several configs by turns."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.models.dinov2 import DINOv2
from sra2_jax.training.optim import make_optimizer
from sra2_jax.training.sharding import batch_sharding, make_mesh, replicated
from sra2_jax.training.state import create_sharded
from sra2_jax.training.step import batch_shapes, make_step


@dataclass
class Timed:
    """A compiled step with its state; `seconds` a step, one entry a round."""

    step: Any
    state: Any
    batch: Any
    encoder_params: Any
    compile_seconds: float
    peak_bytes: int  # on each device: arguments, results and temporaries
    seconds: list[float] = field(default_factory=list)


def made_up(shape: jax.ShapeDtypeStruct, draw: np.random.Generator) -> np.ndarray:
    """Numbers that a batch's array may hold."""
    if shape.dtype == jnp.uint8:
        return draw.integers(256, size=shape.shape, dtype=np.uint8)
    if shape.dtype == jnp.int32:
        return np.zeros(shape.shape, np.int32)
    return np.abs(draw.normal(size=shape.shape)).astype(shape.dtype)


def prepare(config: ConfigDict, encoder: DINOv2 | None = None) -> Timed:
    """Compile the training step and make its first state and a batch.

    Args:
      encoder: run in the step if the config aligns with one on images; its weights are
        made up.

    Raises:
      UserError: a config that cannot work.
    """
    configuration.check(config)
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size, n=config.accumulate)
    transform, schedule = make_optimizer(**config.optim)
    abstract, init = create_sharded(config, transform, mesh)
    shapes, draw = batch_shapes(config, mesh), np.random.default_rng(0)
    batch = {name: made_up(shape, draw) for name, shape in shapes.items()}
    params = None
    if "image" in shapes:
        assert encoder is not None
        side = encoder.config.image_size
        pixels = jnp.zeros((1, side, side, 3))
        place = jax.jit(encoder.init, out_shardings=replicated(mesh))
        params = place(jax.random.key(0), pixels)["params"]
    step = make_step(config, transform, schedule, mesh, abstract, encoder)
    began = time.perf_counter()
    compiled = step.lower(abstract, shapes, params).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    batch = jax.device_put(batch, batch_sharding(mesh))
    return Timed(compiled, init(), batch, params, seconds, peak)


def by_turns(runs: Mapping[str, Timed], rounds: int, steps: int) -> None:
    """Fill `seconds`: every round takes `steps` steps of each run, one by one."""
    for number in range(rounds + 1):
        for run in runs.values():
            began = time.perf_counter()
            for _ in range(steps):
                run.state, metrics = run.step(run.state, run.batch, run.encoder_params)
            jax.block_until_ready((run.state, metrics))
            if number:  # the first round warms up
                run.seconds.append((time.perf_counter() - began) / steps)


def ratio(run: Timed, base: Timed) -> tuple[float, float, float]:
    """Median, smallest and largest of time over `base`'s time in the same round."""
    ratios = np.array(run.seconds) / np.array(base.seconds)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())
