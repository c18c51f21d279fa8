"""Time one training step in many ways: batch sizes, loops, rematerialisation, methods.

    python -m benchmarks.gpu.variants --config=configs/sra2_xl.py --json=FILE \\
        "none: batch_size=256 model.scan=false model.remat=none" \\
        "scan: batch_size=256"

Each argument is a name and what differs from the config. They compile side by side
first, as compiling also times kernels on the device; then each is timed, in the order
given. What does not fit is said and passed over, and after --seconds nothing more is
begun. One line of JSON each, written at once.
"""

import concurrent.futures
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.chips import chip_of
from sra2_jax.command import Parser, run_program, writable
from sra2_jax.errors import one_line
from sra2_jax.programs.fit import peak_bytes
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from tools.measure import (
    Timed,
    begin,
    by_turns,
    compiled,
    machine,
    matmul_speed,
    spread,
)


def describe(name: str, run: Timed, loss: float, matmul: float) -> dict[str, Any]:
    """Figures of a variant, a line of --json."""
    config = run.program.config
    chip = chip_of(jax.devices()[0].device_kind)
    rate = spread(config.batch_size / np.array(run.seconds))
    flops = rate["p50"] * run.program.flops() / config.batch_size
    return {
        "case": name,
        "batch_size": config.batch_size,
        "scan": config.model.scan,
        "remat": config.model.remat,
        "attention": run.program.running.attention,
        "images_per_second": rate,
        "milliseconds": spread(1e3 * np.array(run.seconds)),
        "dispatch_milliseconds": 1e3 * spread(run.dispatch_seconds)["p50"],
        "tflops": flops / 1e12,
        "mfu_nominal": flops / chip.flops if chip else None,
        "mfu_matmul": flops / matmul,
        "peak_gb": peak_bytes(run.step) / 1e9,
        "loss": loss,
        "compile_seconds": run.compile_seconds,
    }


def main() -> None:
    began = time.time()
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("variants", nargs="+", help='"NAME: KEY=VALUE ..."')
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=3, help="a round (%(default)s)")
    add("--threads", type=int, default=4, help="that compile (%(default)s)")
    add("--seconds", type=float, default=1e9, help="begin nothing after them")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_s")
    programs = {}
    for text in arguments.variants:
        name, _, keys = text.partition(":")
        given = dict(key.split("=", 1) for key in keys.split())
        changed = config.override(given)
        program = programs[name] = Program(changed, make_mesh(changed.mesh))
        # Tries cuDNN, which gives wrong gradients while other threads run something.
        print(f"{name}: attention by {program.running.attention}", flush=True)
    facts, matmul = machine(), matmul_speed(jnp.bfloat16)
    print(f"{facts}; bf16 products {matmul / 1e12:.0f} TFLOP/s", flush=True)
    out = arguments.json.open("w") if arguments.json else None
    with ThreadPoolExecutor(arguments.threads) as pool:
        waiting = {n: pool.submit(compiled, p) for n, p in programs.items()}
        concurrent.futures.wait(waiting.values())
        print(f"all compiled at {time.time() - began:.0f} s", flush=True)
        for name, program in programs.items():
            if time.time() - began > arguments.seconds:
                print(f"{name}: no time left", flush=True)
                continue
            try:
                run = begin(program, *waiting.pop(name).result())
                by_turns({name: run}, arguments.rounds, arguments.steps)
                loss = float(run()["loss"])
            except Exception as failure:  # memory, mostly
                print(f"{name}: {one_line(failure)}", flush=True)
                continue
            row = describe(name, run, loss, matmul)
            ms = row["milliseconds"]
            print(
                f"{name}: {row['images_per_second']['p50']:.1f} images/s, "
                f"{ms['p50']:.2f} ms ({ms['p10']:.2f} to {ms['p90']:.2f}), MFU "
                f"{row['mfu_nominal'] or 0:.1%} nominal, {row['mfu_matmul']:.1%} of "
                f"products, {row['peak_gb']:.1f} GB, {row['attention']}, compiled in "
                f"{row['compile_seconds']:.0f} s, at {time.time() - began:.0f} s",
                flush=True,
            )
            if out:
                out.write(json.dumps({"machine": facts, **row}) + "\n")
                out.flush()
            del run


if __name__ == "__main__":
    run_program(main)
