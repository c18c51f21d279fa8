"""Time the training step on made-up latents, vanilla SiT and SRA 2 by turns.

    python -m benchmarks.train_step --config=configs/sra2_s.py --batch_size=4
    python -m benchmarks.train_step --sizes=S,B,L,XL --json=train_step.json

Runs without TensorFlow. Every round runs both; a ratio is the median of the ratios of
the rounds. FLOPs are those of the formula, MFU is against the chip's
nominal peak and against a matrix product timed here. All five methods:
python -m tools.cost --measure=CONFIG.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.chips import chip_of
from sra2_jax.command import Parser, run_program, writable
from sra2_jax.config import Config
from sra2_jax.config_file import SIZES, default, set_size
from sra2_jax.errors import UserError
from sra2_jax.programs.fit import peak_bytes
from tools.measure import (
    Timed,
    by_turns,
    machine,
    matmul_speed,
    prepare,
    ratio,
    spread,
    write,
)


def resized(config: Config, size: str) -> Config:
    """The config with the network of another size, and its aligned blocks."""
    named = default()
    set_size(named, size)
    sizes = {
        "name": f"SiT-{size}/{config.model.patch_size}",
        **{f"model.{key}": named.model[key] for key in ("width", "depth", "heads")},
        **{f"align.{key}.depth": named.align[key].depth for key in named.align},
        "align.teacher.teacher_depth": named.align.teacher.teacher_depth,
    }
    return config.override(sizes)


def describe(run: Timed, matmul: float) -> dict[str, Any]:
    """Figures of one case, the keys of --json."""
    config, flops = run.program.config, run.program.flops()
    speed = spread(config.batch_size / np.array(run.seconds))
    devices = jax.device_count()
    tflops = speed["p50"] * flops / config.batch_size / 1e12
    chip = chip_of(jax.devices()[0].device_kind)
    statistics = jax.local_devices()[0].memory_stats()  # None on a CPU
    return {
        "case": config.name,
        "method": "sra2" if config.align.vae.enabled else "vanilla",
        "batch_size": config.batch_size,
        "tokens": config.grid**2,
        "dtype": config.model.dtype,
        "attention": run.program.running.attention,
        "remat": config.model.remat,
        "scan": config.model.scan,
        "mesh": vars(config.mesh),
        "compile_seconds": run.compile_seconds,
        "rounds": len(run.seconds),
        "images_per_second": speed,
        "step_seconds": spread(run.seconds),
        "cpu_seconds": spread(run.cpu_seconds),
        "dispatch_seconds": spread(run.dispatch_seconds),
        "gflops_per_image": flops / config.batch_size / 1e9,
        "tflops": tflops,
        "matmul_tflops": devices * matmul / 1e12,
        "mfu_matmul": tflops * 1e12 / (devices * matmul),
        "mfu_nominal": tflops * 1e12 / (devices * chip.flops) if chip else None,
        "peak_bytes": peak_bytes(run.step),
        "allocated_bytes": (statistics or {}).get("peak_bytes_in_use"),
    }


def line(row: dict[str, Any]) -> str:
    """A case as text."""
    rate, nominal = row["images_per_second"], row["mfu_nominal"]
    text = (
        f"{row['case']} {row['method']}: {rate['p50']:.2f} images/s "
        f"({rate['p10']:.2f} to {rate['p90']:.2f}), "
        f"{1e3 * row['step_seconds']['p50']:.1f} ms a step, "
        f"{row['tflops']:.3g} TFLOP/s, MFU {row['mfu_matmul']:.1%} of a matrix "
        f"product's {row['matmul_tflops']:.3g} TFLOP/s"
    )
    text += f" ({nominal:.1%} of nominal)" if nominal else ""
    text += f"; {row['peak_bytes'] / 1e9:.2f} GB a device, dispatch "
    text += f"{1e3 * row['dispatch_seconds']['p50']:.1f} ms"
    if jax.default_backend() == "cpu":
        text += f", {row['cpu_seconds']['p50']:.2f} CPU seconds a step"
    return text


def measure(
    config: Config, rounds: int, steps: int, matmul: float
) -> list[dict[str, Any]]:
    """Time vanilla and SRA 2 by turns; prints a line each and the ratio."""
    runs: dict[str, Timed] = {}
    for name, enabled in (("vanilla", False), ("sra2", True)):
        runs[name] = prepare(config.override({"align.vae.enabled": enabled}))
        seconds = runs[name].compile_seconds
        print(f"{config.name} {name}: compiled in {seconds:.1f} s", flush=True)
    by_turns(runs, rounds, steps)
    rows = [describe(run, matmul) for run in runs.values()]
    print("\n".join(line(row) for row in rows))
    median, low, high = ratio(runs["sra2"], runs["vanilla"])
    rows[1]["time_over_vanilla"] = {"median": median, "range": [low, high]}
    print(
        f"{config.name} sra2 / vanilla time: {median:.3f} ({low:.3f} to {high:.3f})",
        flush=True,
    )
    return rows


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sizes", default="", help="S,B,L,XL instead of the config's own")
    add("--batch_size", type=int, help="images a step (the config's)")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=3, help="steps a round and method (%(default)s)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_s")
    sizes = arguments.sizes.upper().split(",") if arguments.sizes else []
    if set(sizes) - set(SIZES):
        raise UserError(f"--sizes={arguments.sizes}: known are {','.join(SIZES)}")
    rows_a_step = arguments.batch_size or config.batch_size
    config = config.override({"batch_size": rows_a_step})
    facts = machine()
    matmul = matmul_speed(jnp.dtype(config.model.dtype))
    print(
        f"{facts['devices']} x {facts['device']}, jax {facts['jax']}; batch "
        f"{config.batch_size}, {config.model.dtype}; load {facts['load']}"
    )
    rows = []
    for made in [resized(config, size) for size in sizes] or [config]:
        rows += measure(made, arguments.rounds, arguments.steps, matmul)
    write(arguments.json, facts, rows)


if __name__ == "__main__":
    run_program(main)
