"""Figures of compiled programs that must not grow: python -m tools.gates.

Compiles the cases of benchmarks/gates.json for --topology (cpu:8; the file has XL on
v5e:4x4 and h200:1, too) and compares peak memory, matrix products, elementwise traffic
and collectives with the figures there. No clock is read, so there is no noise. Exit
status 1, and a line for each figure that grew by more than 3%; --update writes them
instead.
"""

import json
from pathlib import Path
from typing import Any

from sra2_jax import config_file
from sra2_jax.chips import compile_only, compiler
from sra2_jax.command import Parser, run_program
from sra2_jax.errors import UserError
from sra2_jax.programs.fit import advice
from tools.aot import describe, find_devices

GATES = Path(__file__).parents[1] / "benchmarks" / "gates.json"
TOLERANCE = 0.03


def gate_figures(facts: dict[str, Any]) -> dict[str, float]:
    """What a gate compares, by name; more of any is worse."""
    program = facts["program"]
    if not program:
        raise UserError(f"{facts['topology']}: {advice(facts)}")
    figures = {
        "peak_bytes": facts["peak_bytes"],
        "matmuls": program["matmuls"],
        "attention_matmuls": program["attention_matmuls"],
        "matmul_flops": program["matmul_flops"],
        "elementwise_bytes": program["bytes"]["elementwise"],
    }
    for name, row in program["collectives"].items():
        figures |= {f"{name} {key}": value for key, value in row.items()}
    return figures


def compare(figures: dict[str, float], known: dict[str, float]) -> list[str]:
    """A line for each figure that grew by more than TOLERANCE."""
    return [
        f"{name} grew from {known.get(name, 0):,.0f} to {value:,.0f}"
        for name, value in figures.items()
        if value > known.get(name, 0) * (1 + TOLERANCE)
    ]


def gate(path: Path, topology: str, update: bool = False) -> list[str]:
    """Compile the cases of `topology` in a gates file; lines on what grew. update:
    write the figures instead. Raises UserError: no case, or another compiler's."""
    cases = json.loads(path.read_text())
    chosen = {k: case for k, case in cases.items() if case["topology"] == topology}
    if not chosen:
        raise UserError(f"{path} has no case of --topology={topology}")
    _, chip = find_devices(topology)  # says how to get a compiler that is missing
    versions, grown = compiler(chip), []
    for name, case in chosen.items():
        if not update and case["compiler"] != versions:
            raise UserError(
                f"{path}: {name} was recorded with {case['compiler']}, this is "
                f"{versions}: record it again with --update"
            )
        config = config_file.load(case["config"], *case["overrides"])
        figures = gate_figures(describe(config, topology))
        print(f"{name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in figures.items()))
        grown += [f"{name}: {line}" for line in compare(figures, case["figures"])]
        case |= {"compiler": versions, "figures": figures}
    if update:
        path.write_text(json.dumps(cases, indent=2) + "\n")
        return []
    return grown


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--topology", default="cpu:8", help="whose cases (%(default)s)")
    add("--update", action="store_true", help="write the figures into the file")
    arguments = parser.parse_args()
    compile_only()
    grown = gate(GATES, arguments.topology, arguments.update)
    print("\n".join(grown) or "ok")
    return int(bool(grown))


if __name__ == "__main__":
    run_program(main)
