"""Timing of jitted functions by turns, on made-up batches.

Machines are shared and clocks vary, so what is compared runs alternately in one
process, and medians and ratios within a round count.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sra2_jax.optim import make_optimizer
from sra2_jax.state import create_sharded

from sra2_jax import config as configuration
from sra2_jax.models.dinov2 import DINOv2
from sra2_jax.sharding import batch_sharding, make_mesh, replicated
from sra2_jax.step import batch_shapes, make_step

T = TypeVar("T")


@dataclass
class Timed:
    """A compiled step with its state; seconds a step, one entry a round."""

    step: Any
    state: Any
    batch: Any
    encoder_params: Any
    compile_seconds: float
    peak_bytes: int  # on each device: arguments, results and temporaries
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads
    dispatch_seconds: list[float] = field(default_factory=list)  # until a call returns


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
    """Fill the lists: every round takes `steps` steps of each run, one run by one."""
    for number, run in turns(list(runs.values()), rounds):
        began, processor, returned = time.perf_counter(), time.process_time(), []
        for _ in range(steps):
            called = time.perf_counter()
            run.state, metrics = run.step(run.state, run.batch, run.encoder_params)
            returned.append(time.perf_counter() - called)
        jax.block_until_ready((run.state, metrics))
        if number:  # the first round warms up
            run.seconds.append((time.perf_counter() - began) / steps)
            run.cpu_seconds.append((time.process_time() - processor) / steps)
            run.dispatch_seconds.append(float(np.median(returned)))


def turns(runs: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, run) for rounds 0 to `rounds`, each beginning with another run."""
    for number in range(rounds + 1):
        for i in range(len(runs)):
            yield number, runs[(number + i) % len(runs)]


def ratio(run: Timed, base: Timed) -> tuple[float, float, float]:
    """Median, smallest and largest of time over `base`'s time in the same round."""
    ratios = np.array(run.seconds) / np.array(base.seconds)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def spread(values: Sequence[float]) -> dict[str, float]:
    """The 10th, 50th and 90th percentile: p10, p50, p90."""
    quantiles = np.quantile(np.array(values), (0.1, 0.5, 0.9))
    return dict(zip(("p10", "p50", "p90"), map(float, quantiles), strict=True))


def matmul_speed(dtype: Any, side: int = 0, repeats: int = 3) -> float:
    """FLOP/s of one device in products of square matrices, the best of `repeats`.

    Args:
      side: of the matrices; 0: 8192 on accelerators, 2048 on a CPU.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    products = 4

    @jax.jit
    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(products):
            a = a @ b
        return a

    # Columns of +-1/sqrt(side) keep the size of what they multiply.
    keys = jax.random.split(jax.random.key(0))
    device = jax.local_devices()[0]
    a = jax.device_put(jax.random.normal(keys[0], (side, side), dtype), device)
    signs = jax.random.rademacher(keys[1], (side, side), dtype)
    b = jax.device_put(signs / np.sqrt(side).astype(dtype), device)
    jax.block_until_ready(chain(a, b))
    best = min(_seconds(lambda: chain(a, b)) for _ in range(repeats))
    return products * 2 * side**3 / best


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def machine() -> dict[str, Any]:
    """What a figure depends on besides the program."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load": round(os.getloadavg()[0], 1),
    }


def allocated_bytes() -> int | None:
    """The most memory that this process had on its first device; None on a CPU."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
