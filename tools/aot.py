"""Will it fit, and how fast could it be?

python -m tools.aot --config=configs/sra2_xl.py --topology=v5e:4x4 prints what
`python -m sra2_jax fit` does and, from the compiled program, work, traffic and
collectives of one device and an estimate of the step's time. It also knows h200:8,
which needs `pip install -e '.[aot-gpu]'`. `tools.gates` keeps the figures from growing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from sra2_jax import chips
from sra2_jax.chips import CHIPS, Chip
from sra2_jax.command import run_program
from sra2_jax.config import Config
from sra2_jax.programs import fit
from sra2_jax.sharding import mesh
from sra2_jax.step import Program
from tools import absent_gpu, hlo
from tools.roofline import BANDWIDTH_SHARE, MATMUL_SHARE, estimate


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """As `chips.find_devices`, and "h200:8", GPUs of one machine."""
    name, _, number = topology.partition(":")
    if name == "h200" and number.isdigit() and int(number):
        return absent_gpu.find_devices(int(number)), CHIPS[name]
    return chips.find_devices(topology)


def describe(
    config: Config, topology: str, memory_gb: float | None = None
) -> dict[str, Any]:
    """As `fit.describe`, with "program" and "estimate".

    Bytes, counts and FLOPs of "program" are those of one device in one step. None where
    the compiler gives no program, or nothing is known of the chip's speed.

    Raises:
      UserError: no such topology, no compiler, or a mesh or batch that does not fit it.
    """
    devices, chip = find_devices(topology)
    absent = chip is CHIPS["h200"]
    attention = absent_gpu.attention(config.model) if absent else "xla"
    program = Program(config, mesh(config, devices), attention)
    with absent_gpu.present() if absent else contextlib.nullcontext():
        facts, compiled = fit.describe(program, topology, chip, memory_gb)
    facts |= {"program": None, "estimate": None}
    if compiled:
        counts = hlo.count(compiled.as_text())
        facts["program"] = program_facts(counts)
        facts["program"]["flops_xla"] = (compiled.cost_analysis() or {}).get("flops")
        if chip:
            flops = facts["flops_formula"]
            facts["estimate"] = estimate(counts, flops, chip, len(devices))
    return facts


def program_facts(counts: hlo.Counts) -> dict[str, Any]:
    """Counts as JSON."""
    return {
        "matmuls": counts.matmuls,
        "attention_matmuls": counts.attention_matmuls,
        "matmul_flops": counts.matmul_flops,
        "custom_calls": dict(counts.custom_calls),
        "bytes": {kind: counts.traffic[kind] for kind in hlo.TRAFFIC},
        "collectives": {
            " ".join(key): {"count": runs, "bytes": counts.collective_bytes[key]}
            for key, runs in sorted(counts.collectives.items())
        },
        "unknown_loops": counts.unknown_loops,
    }


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as text."""
    yield from fit.lines(facts)
    if program := facts["program"]:
        yield from program_lines(program)
    if timed := facts["estimate"]:
        yield (
            f"estimate       products {1e3 * timed['matmul_seconds']:.1f} ms at "
            f"{MATMUL_SHARE:.0%} of peak, other traffic "
            f"{1e3 * timed['memory_seconds']:.1f} ms at {BANDWIDTH_SHARE:.0%} of "
            f"bandwidth, collectives {1e3 * timed['collective_seconds']:.1f} ms"
        )
        yield (
            f"               step {1e3 * timed['step_seconds_hidden']:.1f} ms, MFU "
            f"{timed['mfu_hidden']:.1%} if collectives hide; "
            f"{1e3 * timed['step_seconds_exposed']:.1f} ms, "
            f"{timed['mfu_exposed']:.1%} if none does"
        )


def program_lines(program: dict[str, Any]) -> Iterator[str]:
    xla = program["flops_xla"] or 0
    yield (
        f"               {program['matmul_flops'] / 1e9:,.1f} in the program's matrix "
        f"products; XLA's own count, loops once, all operations: {xla / 1e9:,.1f}"
    )
    yield (
        f"products       {program['matmuls']}, {program['attention_matmuls']} of them "
        "attention's"
    )
    if calls := program["custom_calls"]:
        made = (f"{name} {n}" for name, n in calls.items())
        yield f"custom calls   {', '.join(made)}"
    moved = (f"{kind} {n / 1e9:.3f}" for kind, n in program["bytes"].items())
    yield f"GB moved       {', '.join(moved)}"
    for name, row in program["collectives"].items():
        yield f"{name:22} {row['count']:6} x, {row['bytes'] / 1e6:,.2f} MB in all"
    if program["unknown_loops"]:
        yield f"loops of unknown length, counted once: {len(program['unknown_loops'])}"


def main() -> int:
    arguments, config = fit.parse(__doc__ or "")
    facts = describe(config, arguments.topology, arguments.memory_gb)
    return fit.report(facts, lines(facts), arguments.json)


if __name__ == "__main__":
    run_program(main)
