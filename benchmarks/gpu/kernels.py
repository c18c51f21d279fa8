"""Where a training step's time goes on the device, kernel by kernel.

    python -m benchmarks.gpu.kernels --config=configs/sra2_xl.py --batch_size=256 \\
        --json=kernels.json

Traces a few steps on a made-up batch and adds up what ran on the device, by kind and
by name.
"""

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from sra2_jax.command import Parser, run_program, writable
from tools.measure import Timed, machine, prepare

# The first that a kernel's name holds.
KINDS = {
    "attention": r"fmha|flash|sdpa|cudnn.*attention|dot_product_attention",
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|dot",
    "fusions, reducing": r"input_.*reduce|reduce",
    "fusions, Triton": r"triton|^fusion",
    "fusions, loop": r"loop_|wrapped_|fusion",
    "copies": r"memcpy|memset|copy",
}


def device_events(file: Path) -> dict[str, list[float]]:
    """Seconds of every event on the device, by name; on a CPU of XLA's threads."""
    data: Any = jax.profiler.ProfileData.from_file(str(file))
    found: dict[str, list[float]] = defaultdict(list)
    planes = list(data.planes)
    devices = [p for p in planes if p.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            if line.name.startswith("Stream") if devices else "XLA" in line.name:
                for event in line.events:
                    found[event.name].append(event.duration_ns / 1e9)
    return found


def steps(run: Timed, count: int) -> None:
    for _ in range(count):
        metrics = run()
    jax.block_until_ready((run.state, metrics))


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--batch_size", type=int, help="images a step (the config's)")
    add("--steps", type=int, default=3, help="traced (%(default)s)")
    add("--top", type=int, default=40, help="names shown (%(default)s)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_s")
    rows = arguments.batch_size or config.batch_size
    run = prepare(config.override({"batch_size": rows}))
    facts = machine()
    print(f"compiled in {run.compile_seconds:.1f} s; {facts['device']}", flush=True)
    steps(run, 2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(run, arguments.steps)
        found = device_events(max(Path(folder).rglob("*.xplane.pb")))
    table = {name: 1e3 * sum(s) / arguments.steps for name, s in found.items()}
    kinds: dict[str, float] = defaultdict(float)
    for name, ms in table.items():
        kind = next(
            (k for k, r in KINDS.items() if re.search(r, name.lower())), "other"
        )
        kinds[kind] += ms
    total = sum(table.values())
    print(f"{total:.2f} ms of device time a step")
    for kind, ms in sorted(kinds.items(), key=lambda row: -row[1]):
        print(f"{ms:9.2f} ms {ms / total:6.1%}  {kind}")
    ordered = dict(sorted(table.items(), key=lambda row: -row[1]))
    for name, ms in list(ordered.items())[: arguments.top]:
        times = len(found[name]) / arguments.steps
        print(f"{ms:9.3f} ms {ms / total:6.1%} {times:7.1f} x  {name[:100]}")
    if arguments.json:
        result = {"machine": facts, "kinds": kinds, "milliseconds": ordered}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
