"""Chips that a program can be compiled for, and what one can do at most.

Sources: Cloud TPU's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, the tables
of jax-ml/scaling-book's tpus.md (links between chips) and NVIDIA's data sheets.
Memory of a TPU is what its compiler lets a program use (libtpu 0.0.42.1), a little less
than the chip has; that of an H200 is what its driver reports.
"""

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from sra2_jax.errors import UserError
from tools import gpu_topology
from tools.hlo import Counts

GIB = 2**30
TPUS = ("v4", "v5e", "v5p", "v6e")
# What an estimate takes for granted, of the nominal figures; those that were measured
# on an H200.
MATMUL_SHARE, BANDWIDTH_SHARE = 0.8, 0.9
KNOWN = (
    "v4 and v5p: 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, ...; "
    "v5e and v6e: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; h200:N; cpu:N"
)
# libtpu would look for its machine; a value of the machine's own stays.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several programs may compile
}


@dataclass(frozen=True)
class Chip:
    """One chip; `links` is what it sends to its neighbours along one axis of the
    network, both directions together."""

    name: str
    flops: float  # dense bfloat16, a second
    bandwidth: float  # of main memory, bytes a second
    links: float  # bytes a second
    memory: float  # bytes


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1.2e12, 90e9, 30.75 * GIB),
        Chip("v5e", 197e12, 0.819e12, 100e9, 15.75 * GIB),
        Chip("v5p", 459e12, 2.765e12, 200e9, 95.74 * GIB),
        Chip("v6e", 918e12, 1.64e12, 200e9, 31.25 * GIB),
        Chip("a100", 312e12, 2.039e12, 600e9, 80e9),
        Chip("h100", 989e12, 3.35e12, 900e9, 80e9),
        Chip("h200", 989e12, 4.8e12, 900e9, 140.4 * GIB),
    )
}


def compile_only() -> None:
    """Use no device of this machine: of TPUs and GPUs only the compilers are needed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # "no GPU found", of the plugin
    jax.config.update("jax_platforms", "cpu")


def of_device(kind: str) -> Chip | None:
    """The chip that a device calls itself, as "TPU v5 lite"; None of others."""
    name = kind.lower().replace(" lite", "e").replace("tpu v5p", "v5p")
    name = "v5p" if name == "tpu v5" else name
    return next((chip for chip in CHIPS.values() if chip.name in name), None)


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """The devices of a topology, "v5e:4x4" or "cpu:8", and their chip; CPUs have none.

    Raises:
      UserError: there is no such topology, or no libtpu.
    """
    name, _, shape = topology.partition(":")
    if name in ("cpu", "h200") and shape.isdigit() and int(shape):
        if name == "cpu":
            return _processors(int(shape)), None
        return gpu_topology.find_devices(int(shape)), CHIPS[name]
    if name not in TPUS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"unknown --topology={topology}: known are {KNOWN}")
    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            f"--topology={topology} needs the package libtpu: pip install -e '.[aot]'"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        made = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"unknown --topology={topology} ({reason}): known are {KNOWN}"
        ) from error
    return list(made.devices), CHIPS[name]


def _processors(n: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX runs already, with what it has
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise UserError(f"--topology=cpu:{n}: this process has {len(devices)} devices")
    return devices[:n]


def estimate(
    counts: Counts, flops: float, chip: Chip, devices: int
) -> dict[str, float]:
    """Seconds of a step, and MFU: a roofline, no measurement.

    An instruction with a matrix product takes the longer of its arithmetic and its
    traffic, every other one its traffic, at MATMUL_SHARE of the chip's FLOPs and
    BANDWIDTH_SHARE of its bandwidth, one after the other. Collectives go round a ring
    along one axis of the network, behind the rest ("hidden") or after it ("exposed").

    Args:
      flops: of the step by formula, over all devices; MFU is counted from them.
    """
    speed, bandwidth = MATMUL_SHARE * chip.flops, BANDWIDTH_SHARE * chip.bandwidth
    compute = sum(
        runs * max(flops / speed, size / bandwidth)
        for flops, size, runs in counts.products
    )
    others = sum(counts.traffic[k] for k in ("elementwise", "copy", "custom"))
    memory = others / bandwidth
    wire = 0.0
    for (kind, _), size in counts.collective_bytes.items():
        # A ring sends an array once to gather or scatter it, twice to reduce it.
        rounds = 2 if kind == "all-reduce" else 1
        wire += rounds * size * (devices - 1) / devices / chip.links
    busy = compute + memory
    best, worst = max(busy, wire), busy + wire
    peak = flops / (chip.flops * devices)
    return {
        "matmul_seconds": compute,
        "memory_seconds": memory,
        "collective_seconds": wire,
        "step_seconds_hidden": best,
        "step_seconds_exposed": worst,
        "mfu_hidden": peak / best,
        "mfu_exposed": peak / worst,
    }
