"""Will it fit, and how fast could it be?

python -m tools.aot --config=configs/sra2_xl.py --topology=v5e:4x4 compiles the real
training step for 16 chips without one of them, and prints memory, work, traffic and
collectives of one device as the compiled program has them, and an estimate of the
step's time. Exit status 1 if it does not fit. TPUs need `pip install -e '.[aot]'`,
h200:8 '.[aot-gpu]', cpu:8 nothing. `tools.gates` keeps the figures from growing.
"""

import argparse
import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from sra2_jax.optim import make_optimizer
from sra2_jax.state import count_parameters, create_sharded

from sra2_jax import config as configuration
from sra2_jax.command import run_program, writable
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2
from sra2_jax.sharding import make_mesh, replicated
from sra2_jax.step import batch_shapes, make_step
from tools import gpu_topology, hlo
from tools.chips import (
    BANDWIDTH_SHARE,
    KNOWN,
    MATMUL_SHARE,
    Chip,
    compile_only,
    estimate,
    find_devices,
)
from tools.cost import load_architecture, training_flops

# Of the chip's memory, for what runs beside the step: the next batch, a sampler.
RESERVE = 0.03


@dataclass
class Program:
    """A training step for devices that need not exist."""

    mesh: Mesh
    state: Any  # ShapeDtypeStructs, as the other two
    batch: dict[str, jax.ShapeDtypeStruct]
    encoder_params: Any
    encoder: DINOv2 | None
    compiled: Any  # None where the compiler ran out of the chip's memory
    needed: int | None  # bytes a device that it asked for then, if it says
    seconds: float


def abstract_encoder(config: ConfigDict, mesh: Mesh) -> tuple[DINOv2, Any]:
    """The encoder that the step runs, and its parameters' shapes, replicated."""
    encoder = load_architecture(config)
    side = encoder.config.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
    place = replicated(mesh)
    return encoder, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )


def compile_program(config: ConfigDict, devices: list[Any]) -> Program:
    """Compile the training step of `config` for `devices`.

    Raises:
      UserError: the mesh does not fit the devices or the batch.
    """
    mesh = make_mesh(
        **config.mesh,
        batch_size=config.batch_size,
        n=config.accumulate,
        devices=devices,
    )
    transform, schedule = make_optimizer(**config.optim)
    state, _ = create_sharded(config, transform, mesh)
    batch = batch_shapes(config, mesh)
    encoder, params = None, None
    if "image" in batch:
        encoder, params = abstract_encoder(config, mesh)
    step = make_step(config, transform, schedule, mesh, state, encoder)
    began, compiled, needed = time.perf_counter(), None, None
    try:
        compiled = step.lower(state, batch, params).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"\(([\d.]+)G\) exceeds", str(error))
        needed = int(float(found.group(1)) * 2**30) if found else None
    seconds = time.perf_counter() - began
    return Program(mesh, state, batch, params, encoder, compiled, needed, seconds)


def peak_bytes(compiled: Any) -> int:
    """Memory of one device while the step runs."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a placed tree on one device."""
    shards = (
        (leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )
    return sum(
        jax.ShapeDtypeStruct(shape, dtype).size * dtype.itemsize
        for shape, dtype in shards
    )


def compiler(chip: Chip | None) -> str:
    """Package and version of what compiles for a chip, besides JAX."""
    if chip is None:
        return ""
    package = "jax-cuda12-pjrt" if chip.name == "h200" else "libtpu"
    return f"{package} {version(package)}"


def describe(
    config: ConfigDict, topology: str, memory_gb: float | None = None
) -> dict[str, Any]:
    """Compile, and say what the program takes: the keys of --json.

    Bytes, counts and FLOPs of "program" are those of one device in one step. "fits" is
    None where nothing is known of the devices' memory.

    Args:
      memory_gb: of a device, 10^9 bytes, instead of the chip's own.

    Raises:
      UserError: as `find_devices` and `compile_program`.
    """
    devices, chip = find_devices(topology)
    absent_gpu = chip is not None and chip.name == "h200"
    with gpu_topology.present() if absent_gpu else contextlib.nullcontext():
        made = compile_program(config, devices)
    memory = memory_gb * 1e9 if memory_gb else chip.memory if chip else None
    limit = memory * (1 - RESERVE) if memory else None
    peak = peak_bytes(made.compiled) if made.compiled else made.needed
    state, flops = made.state, training_flops(config, made.encoder)
    facts: dict[str, Any] = {
        "config": config.name,
        "topology": topology,
        "devices": len(devices),
        "batch_size": config.batch_size,
        "mesh": dict(made.mesh.shape),
        "scan": config.model.scan,
        "remat": config.model.remat,
        "accumulate": config.accumulate,
        "jax": jax.__version__,
        "compiler": compiler(chip),
        "parameters": {k: count_parameters(v) for k, v in state.params.items()},
        "bytes": {
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.opt_state),
            "ema": device_bytes(state.ema),
            "encoder": device_bytes(made.encoder_params),
            "batch": device_bytes(made.batch),
        },
        "peak_bytes": peak,
        "memory_bytes": memory,
        "fits": None,
        "flops_formula": flops,
        "compile_seconds": round(made.seconds, 1),
        "program": None,
        "estimate": None,
    }
    if limit or not made.compiled:
        facts["fits"] = bool(made.compiled and peak and limit and peak <= limit)
    if made.compiled:
        cost: Any = made.compiled.cost_analysis() or {}
        counts = hlo.count(made.compiled.as_text())
        facts["program"] = program_facts(counts) | {"flops_xla": cost.get("flops")}
        if chip:
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


def advice(facts: dict[str, Any]) -> str:
    """One line: whether it fits, and what to change if it does not."""
    peak, memory = facts["peak_bytes"], facts["memory_bytes"]
    if facts["fits"] is None:
        return "fits: not known, as the devices' memory is not (--memory_gb)"
    need = f"needs {peak / 1e9:.2f} GB a device" if peak else "needs more"
    if memory:
        need += f" of {memory / 1e9:.2f} GB, {RESERVE:.0%} of them in reserve"
    if facts["fits"]:
        return f"fits: {need}"
    changes = []
    if facts["remat"] != "full":
        changes.append("--config.model.remat=full")
    if facts["mesh"]["fsdp"] < facts["devices"]:
        changes.append("a larger --config.mesh.fsdp")
    if facts["batch_size"] > facts["devices"] * facts["accumulate"]:
        changes.append("a larger --config.accumulate or a smaller --config.batch_size")
    changes.append("more devices")
    return f"does not fit: {need}: try {', '.join(changes)}"


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as text."""
    mesh = " x ".join(f"{name} {n}" for name, n in facts["mesh"].items())
    yield (
        f"{facts['config']} on {facts['topology']}: {facts['devices']} devices ({mesh})"
        f", batch {facts['batch_size']}, remat {facts['remat']}, "
        f"{'scan' if facts['scan'] else 'unrolled'}; jax {facts['jax']}"
        + (f", {facts['compiler']}" if facts["compiler"] else "")
    )
    count = (f"{name} {n / 1e6:.1f}M" for name, n in facts["parameters"].items())
    yield f"parameters     {', '.join(count)}"
    held = (f"{name} {n / 1e9:.3f}" for name, n in facts["bytes"].items() if n)
    yield f"GB a device    {', '.join(held)}"
    yield f"compiled in    {facts['compile_seconds']:.1f} s"
    share = facts["flops_formula"] / facts["devices"] / 1e9
    yield f"GFLOP a device {share:,.1f} by formula (training, network and heads 3 x)"
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
    yield advice(facts)


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
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--topology", default="", help="v5e:4x4, v5p:2x2x1, h200:8, cpu:8 ...")
    add("--memory_gb", type=float, help="of a device (the chip's)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = configuration.parse_arguments(parser, "configs/sra2_xl.py")
    compile_only()
    if arguments.memory_gb is not None and not arguments.memory_gb > 0:
        raise UserError(f"--memory_gb={arguments.memory_gb} must be above 0")
    if not arguments.topology:
        raise UserError(f"--topology is missing: known are {KNOWN}")
    facts = describe(config, arguments.topology, arguments.memory_gb)
    print("\n".join(lines(facts)))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(facts["fits"] is False)


if __name__ == "__main__":
    run_program(main)
