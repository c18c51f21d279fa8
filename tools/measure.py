"""Timing of jitted functions by turns, on made-up batches.

Machines are shared and clocks vary, so what is compared runs alternately in one
process, and medians and ratios within a round count.
"""

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.config import Config
from sra2_jax.sharding import mesh
from sra2_jax.step import Program

T = TypeVar("T")


@dataclass
class Timed:
    """A compiled step with its state; seconds a step, one entry a round."""

    program: Program
    step: Any
    state: Any
    batch: Any
    frozen: Any
    compile_seconds: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads
    dispatch_seconds: list[float] = field(default_factory=list)  # until a call returns

    def __call__(self, batch: Any = None) -> Any:
        """One step, not waited for; its metrics."""
        batch = self.batch if batch is None else batch
        self.state, metrics = self.step(self.state, batch, self.frozen)
        return metrics


def made_up(shape: jax.ShapeDtypeStruct, draw: np.random.Generator) -> jax.Array:
    """Numbers that a batch's array may hold."""
    if shape.dtype == jnp.uint8:
        values = draw.integers(256, size=shape.shape, dtype=np.uint8)
    elif shape.dtype == jnp.int32:
        values = np.zeros(shape.shape, np.int32)
    else:
        values = np.abs(draw.normal(size=shape.shape)).astype(shape.dtype)
    return jax.device_put(values, shape.sharding)


def compiled(program: Program) -> tuple[Any, float]:
    """The compiled training step, and the seconds that it took."""
    began = time.perf_counter()
    return program.lower().compile(), time.perf_counter() - began


def begin(program: Program, step: Any, compile_seconds: float) -> Timed:
    """A compiled step with its first state and a batch; the weights of networks that
    targets run are made up."""
    draw = np.random.default_rng(0)
    batch = {name: made_up(shape, draw) for name, shape in program.batch.items()}
    small = jax.tree.map(lambda s: 0.02 * made_up(s, draw), program.frozen)
    return Timed(program, step, program.start(), batch, small, compile_seconds)


def prepare(config: Config) -> Timed:
    """Compile the training step of a config and `begin` it.

    Raises:
      UserError: the mesh or the batch does not fit the devices.
    """
    program = Program(config, mesh(config))
    return begin(program, *compiled(program))


def by_turns(runs: Mapping[str, Timed], rounds: int, steps: int) -> None:
    """Fill the lists: every round takes `steps` steps of each run, one run by one."""
    for number, run in turns(list(runs.values()), rounds):
        began, processor, returned = time.perf_counter(), time.process_time(), []
        for _ in range(steps):
            called = time.perf_counter()
            metrics = run()
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


def spread(values: Any) -> dict[str, float]:
    """The 10th, 50th and 90th percentile: p10, p50, p90."""
    quantiles = np.quantile(np.array(values), (0.1, 0.5, 0.9))
    return dict(zip(("p10", "p50", "p90"), map(float, quantiles), strict=True))


def matmul_speed(dtype: Any) -> float:
    """FLOP/s of one device in products of square matrices, the best of three."""
    side, products = 2048 if jax.default_backend() == "cpu" else 8192, 4
    chain = jax.jit(lambda a, b: functools.reduce(jnp.matmul, [b] * products, a))
    # Columns of +-1/sqrt(side) keep the size of what they multiply.
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (side, side), dtype)
    signs = jax.random.rademacher(keys[1], (side, side), dtype)
    b = signs / np.sqrt(side).astype(dtype)
    seconds = []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(chain(a, b))
        seconds.append(time.perf_counter() - began)
    return products * 2 * side**3 / min(seconds)


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


def write(file: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file of a benchmark's --json, if it is asked for."""
    if file:
        text = json.dumps({"machine": facts, "cases": rows}, indent=2)
        file.write_text(text + "\n")
