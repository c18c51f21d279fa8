"""Time the training step on made-up latents, vanilla SiT and SRA 2 by turns.

    python -m benchmarks.train_step --config=configs/sra2_s.py --config.batch_size=4

Runs without TensorFlow. Prints the seconds to compile each step and, over rounds in
which both run, the median images/s with its range and the median of SRA 2's time over
vanilla's in the same round. All five methods: python -m sra2_jax.cost --measure=CONFIG.
"""

import argparse

import jax
import numpy as np

from sra2_jax import config as configuration
from sra2_jax.errors import run_program
from sra2_jax.measure import by_turns, prepare, ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a round and method")
    arguments, config = configuration.parse_arguments(parser, "configs/sra2_s.py")
    runs = {}
    for name, enabled in (("vanilla", False), ("sra2", True)):
        config.align.vae.enabled = enabled
        runs[name] = prepare(config)
        print(f"{name}: compiled in {runs[name].compile_seconds:.1f} s", flush=True)
    by_turns(runs, arguments.rounds, arguments.steps)
    for name, run in runs.items():
        rate = config.batch_size / np.array(run.seconds)
        print(
            f"{name}: {np.median(rate):.2f} images/s ({rate.min():.2f} to "
            f"{rate.max():.2f}), {np.median(run.seconds):.3f} s a step"
        )
    median, low, high = ratio(runs["sra2"], runs["vanilla"])
    device = jax.devices()[0].device_kind
    print(
        f"sra2 / vanilla time: {median:.3f} ({low:.3f} to {high:.3f}); {config.name}, "
        f"batch {config.batch_size}, {config.model.dtype}, {jax.device_count()} x "
        f"{device}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    run_program(main)
