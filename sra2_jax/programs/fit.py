"""Does a config fit on chips that need not be here?

    python -m sra2_jax fit --config=sra2_xl --topology=v5e:4x4

compiles the real training step for 16 chips without one of them, and prints memory and
work of one device. Exit status 1, and what to change, if it does not fit. TPUs need
`pip install -e '.[aot]'`, cpu:8 nothing.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from sra2_jax import chips
from sra2_jax.chips import Chip
from sra2_jax.command import Parser, writable
from sra2_jax.config import Config
from sra2_jax.sharding import mesh
from sra2_jax.step import Program, count_parameters

# Of the chip's memory, for what runs beside the step: the next batch, a sampler.
RESERVE = 0.03
CHANGES = (
    "--config.model.remat=full, a larger --config.mesh.fsdp, a larger "
    "--config.accumulate, a smaller --config.batch_size, more devices"
)


def compiled_step(program: Program) -> tuple[Any, int | None]:
    """The compiled step and the bytes that a device needs for it.

    Where the compiler runs out of the chip's memory the step is None, and the bytes are
    those that it asked for, if it says.
    """
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"\(([\d.]+)G\) exceeds", str(error))
        return None, int(float(found.group(1)) * 2**30) if found else None
    return compiled, peak_bytes(compiled)


def peak_bytes(compiled: Any) -> int:
    """Memory of one device while a compiled program runs."""
    memory = compiled.memory_analysis()
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return ends - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def device_bytes(tree: Any) -> int:
    """Bytes of a placed tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def describe(
    program: Program, topology: str, chip: Chip | None, memory_gb: float | None = None
) -> tuple[dict[str, Any], Any]:
    """What a training step takes, the keys of --json, and the compiled step.

    "fits" is None where nothing is known of the devices' memory.

    memory_gb: of a device, 10^9 bytes, instead of the chip's own.
    """
    config, state = program.config, program.abstract
    began = time.perf_counter()
    compiled, peak = compiled_step(program)
    seconds = time.perf_counter() - began
    memory = memory_gb * 1e9 if memory_gb else chip.memory if chip else None
    fits = False if not compiled else None
    if compiled and memory:
        fits = (peak or 0) <= memory * (1 - RESERVE)
    held = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "ema": state.ema,
        "encoder": program.frozen,
        "batch": program.batch,
    }
    facts = {
        "config": config.name,
        "topology": topology,
        "devices": program.mesh.size,
        "batch_size": config.batch_size,
        "mesh": dict(program.mesh.shape),
        "scan": config.model.scan,
        "remat": config.model.remat,
        "accumulate": config.accumulate,
        "compiler": chips.compiler(chip),
        "parameters": {k: count_parameters(v) for k, v in state.params.items()},
        "bytes": {name: device_bytes(tree) for name, tree in held.items()},
        "peak_bytes": peak,
        "memory_bytes": memory,
        "fits": fits,
        "flops_formula": program.flops(),
        "compile_seconds": round(seconds, 1),
    }
    return facts, compiled


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as text."""
    mesh = " x ".join(f"{name} {n}" for name, n in facts["mesh"].items())
    yield (
        "{config} on {topology}: {devices} devices ({0}), batch {batch_size}, remat "
        "{remat}, scan {scan}; {compiler}".format(mesh, **facts)
    )
    count = (f"{name} {n / 1e6:.1f}M" for name, n in facts["parameters"].items())
    yield f"parameters     {', '.join(count)}"
    held = (f"{name} {n / 1e9:.3f}" for name, n in facts["bytes"].items() if n)
    yield f"GB a device    {', '.join(held)}"
    yield f"compiled in    {facts['compile_seconds']:.1f} s"
    share = facts["flops_formula"] / facts["devices"] / 1e9
    yield f"GFLOP a device {share:,.1f} by formula (training, network and heads 3 x)"


def advice(facts: dict[str, Any]) -> str:
    """One line: whether it fits, and what to change if it does not."""
    peak, memory = facts["peak_bytes"], facts["memory_bytes"]
    need = f"needs {peak / 1e9:.2f} GB a device" if peak else "needs more"
    if facts["fits"] is None:
        return f"{need}; whether that fits is not known without --memory_gb"
    if memory:
        need += f" of {memory / 1e9:.2f} GB, {RESERVE:.0%} of them in reserve"
    return f"fits: {need}" if facts["fits"] else f"does not fit: {need}: try {CHANGES}"


def parse(about: str) -> tuple[argparse.Namespace, Config]:
    """The flags of a program that compiles for absent chips, and the config."""
    parser = Parser(description=about.splitlines()[0])
    add = parser.add_argument
    add("--topology", default="", help="v5e:4x4, v5p:2x2x1, cpu:8 ...")
    add("--memory_gb", type=float, help="of a device (the chip's)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_xl")
    chips.compile_only()
    return arguments, config


def report(facts: dict[str, Any], text: Iterable[str], file: Path | None) -> int:
    """Print the text and the advice, write the facts; the program's exit status."""
    print("\n".join([*text, advice(facts)]))
    if file:
        file.write_text(json.dumps(facts, indent=2) + "\n")
    return int(facts["fits"] is False)


def main() -> int:
    arguments, config = parse(__doc__ or "")
    devices, chip = chips.find_devices(arguments.topology)
    program = Program(config, mesh(config, devices), "xla")
    facts, _ = describe(program, arguments.topology, chip, arguments.memory_gb)
    return report(facts, lines(facts), arguments.json)
