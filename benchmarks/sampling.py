"""Time the sampler: guided everywhere, in the interval, by the head, and not at all.

    python -m benchmarks.sampling --config=configs/sra2_xl.py --batch_size=256

Latents only, with random weights (decoding is 0.5% of the work at XL/2). Every round
runs all. Network rows an image are what the interval leaves: two inside it, one
outside. Runs without TensorFlow.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.chips import chip_of
from sra2_jax.command import Parser, run_program, writable
from sra2_jax.config import Config
from sra2_jax.errors import UserError
from sra2_jax.generator import make_sampler
from sra2_jax.programs.fit import peak_bytes
from sra2_jax.sampler import time_grid
from sra2_jax.sharding import make_mesh, replicated
from sra2_jax.step import Program
from sra2_jax.transport import Transport
from tools.measure import machine, matmul_speed, spread, turns, write


def guidances(config: Config) -> dict[str, dict[str, float]]:
    """What each case changes of config.sampling; the scale is the config's, or 1.8."""
    scale = config.sampling.guidance
    scale = 1.8 if scale == 1.0 else scale
    none = dict.fromkeys(("guidance", "guidance_high", "head_guidance"), 1.0)
    none |= {"guidance_low": 0.0}
    cases = {
        "no guidance": none,
        "guided in [0, 0.7]": none | {"guidance": scale, "guidance_high": 0.7},
        "guided everywhere": none | {"guidance": scale},
    }
    if config.align.vae.enabled:
        cases["guided by the head"] = none | {"head_guidance": 1.4}
    return cases


@dataclass
class Case:
    """A compiled sampler; seconds a batch, one entry a round."""

    config: Config
    compiled: Any
    inputs: tuple[Any, ...]
    compile_seconds: float
    seconds: list[float] = field(default_factory=list)


def network_rows(config: Config) -> int:
    """Rows that the network sees for one image, by the times of the sampler."""
    s = config.sampling
    times = time_grid(s.method, s.steps, Transport(**vars(config.transport)))[:-1]
    inside = (s.guidance_low <= times) & (times <= s.guidance_high)
    rows = np.where(inside & (s.guidance != 1.0), 2, 1)
    # Heun calls twice in every step but the last.
    return int(2 * rows.sum() - rows[-1] if s.method == "heun" else rows.sum())


def prepare(program: Program, params: Any, images: int) -> Case:
    """Compile the sampler of a program."""
    numbers = jnp.arange(images, dtype=jnp.int32)
    inputs = params, numbers, numbers % program.config.data.num_classes
    began = time.perf_counter()
    compiled = make_sampler(program).lower(*inputs).compile()
    return Case(program.config, compiled, inputs, time.perf_counter() - began)


def measure(config: Config, rounds: int) -> list[dict[str, Any]]:
    """Time the cases by turns; figures of each, the keys of --json."""
    mesh = make_mesh()
    images = -(-config.sampling.batch_size // mesh.size) * mesh.size
    program = Program(config, mesh)
    network, place = program.network, replicated(mesh)
    params = jax.jit(lambda: program.init().params, out_shardings=place)()
    cases = {}
    for name, changes in guidances(config).items():
        own = config.override({f"sampling.{k}": v for k, v in changes.items()})
        program = Program(own, mesh)
        cases[name] = prepare(program, params, images)
        seconds = cases[name].compile_seconds
        print(f"{name}: compiled in {seconds:.1f} s", flush=True)
    for number, case in turns(list(cases.values()), rounds):
        began = time.perf_counter()
        latents = jax.block_until_ready(case.compiled(*case.inputs))
        if number:
            case.seconds.append(time.perf_counter() - began)
        elif not bool(jnp.isfinite(latents).all()):
            raise UserError(f"{config.name}: samples are not finite")
    speed = mesh.size * matmul_speed(jnp.dtype(config.sampling.dtype))
    chip = chip_of(jax.devices()[0].device_kind)
    own = config.override({"model.dtype": config.sampling.dtype})
    attention = Program(own, mesh).running.attention
    base, rows = cases["guided everywhere"].seconds, []
    for name, case in cases.items():
        rate = spread(images / np.array(case.seconds))
        evaluated = network_rows(case.config)
        flops = 2.0 * network.macs(network.model.depth) * evaluated * rate["p50"]
        ratio = float(np.median(np.array(case.seconds) / np.array(base)))
        row = {
            "case": f"{config.name}, {name}",
            "batch_size": images,
            "method": config.sampling.method,
            "dtype": own.model.dtype,
            "attention": attention,
            "steps": config.sampling.steps,
            "network_rows": evaluated,
            "images_per_second": rate,
            "tflops": flops / 1e12,
            "mfu_matmul": flops / speed,
            "mfu_nominal": flops / (mesh.size * chip.flops) if chip else None,
            "time_over_guided": ratio,
            "compile_seconds": case.compile_seconds,
            "peak_bytes": peak_bytes(case.compiled),
            "rounds": len(case.seconds),
        }
        rows.append(row)
        print(
            f"{name}: {rate['p50']:.3g} images/s ({rate['p10']:.3g} to "
            f"{rate['p90']:.3g}), {evaluated} network rows an image, time "
            f"{ratio:.3f} of guided everywhere, {row['tflops']:.3g} TFLOP/s, MFU "
            f"{row['mfu_matmul']:.1%} of a matrix product"
            + (f" ({row['mfu_nominal']:.1%} of nominal)" if chip else "")
            + f"; {row['peak_bytes'] / 1e9:.2f} GB a device"
        )
    return rows


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--batch_size", type=int, help="images at a time (config.sampling.batch_size)")
    add("--rounds", type=int, default=3)
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_xl")
    images = arguments.batch_size or config.sampling.batch_size
    config = config.override({"sampling.batch_size": images})
    facts, s = machine(), config.sampling
    print(
        f"{config.name}, {s.steps} steps of {s.method}, batch {s.batch_size}, "
        f"{config.sampling.dtype}; {facts['devices']} x {facts['device']}, jax "
        f"{facts['jax']}; load {facts['load']}"
    )
    rows = measure(config, arguments.rounds)
    write(arguments.json, facts, rows)


if __name__ == "__main__":
    run_program(main)
