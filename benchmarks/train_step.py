"""Time the training step on made-up latents, vanilla SiT and SRA 2 by turns.

    python -m benchmarks.train_step --config=configs/sra2_s.py --batch_size=4

Runs without TensorFlow. Prints the seconds to compile each step and, over rounds in
which both run, the median images/s with its range and the median of SRA 2's time over
vanilla's in the same round.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.training.optim import make_optimizer
from sra2_jax.training.sharding import batch_sharding, make_mesh
from sra2_jax.training.state import create_sharded
from sra2_jax.training.step import make_step


def load(path: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def prepare(config: ConfigDict) -> tuple[Any, Any, Any, float]:
    """Compiled step, state, batch on the devices, seconds to compile."""
    configuration.check(config)
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size, n=config.accumulate)
    transform, schedule = make_optimizer(**config.optim)
    abstract, init = create_sharded(config, transform, mesh)
    draw = np.random.default_rng(0)
    latents = config.latents
    shape = (config.batch_size, latents.size, latents.size, latents.channels)
    batch = {
        "mean": draw.normal(size=shape).astype(np.float16),
        "std": draw.uniform(0.1, 0.3, size=shape).astype(np.float16),
        "label": draw.integers(config.data.num_classes, size=shape[0], dtype=np.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_step(config, transform, schedule, mesh, abstract)
    began = time.perf_counter()
    compiled = step.lower(abstract, batch).compile()
    return compiled, init(), batch, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/sra2_s.py")
    parser.add_argument("--batch_size", type=int, help="default: the config's")
    parser.add_argument("--dtype", help="default: the config's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a round and method")
    args = parser.parse_args()
    runs = {}
    for name, enabled in (("vanilla", False), ("sra2", True)):
        config = load(str(Path(args.config)))
        config.align.vae.enabled = enabled
        config.batch_size = args.batch_size or config.batch_size
        config.data.streams = 1
        config.model.dtype = args.dtype or config.model.dtype
        runs[name] = list(prepare(config))
        print(f"{name}: compiled in {runs[name][3]:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            step, state, batch, _ = run
            began = time.perf_counter()
            for _ in range(args.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            run[1] = state
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / args.steps)
    for name, times in seconds.items():
        rate = config.batch_size / np.array(times)
        print(
            f"{name}: {np.median(rate):.2f} images/s ({rate.min():.2f} to "
            f"{rate.max():.2f}), {np.median(times):.3f} s a step"
        )
    ratios = np.array(seconds["sra2"]) / np.array(seconds["vanilla"])
    device = jax.devices()[0].device_kind
    print(
        f"sra2 / vanilla time: {np.median(ratios):.3f} ({ratios.min():.3f} to "
        f"{ratios.max():.3f}); {args.config}, batch {config.batch_size}, "
        f"{config.model.dtype}, {jax.device_count()} x {device}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()
