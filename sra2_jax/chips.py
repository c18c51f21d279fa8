"""Chips that a program can be compiled for, and what one can do at most.

Sources: Cloud TPU's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, the tables
of jax-ml/scaling-book's tpus.md (links between chips) and NVIDIA's data sheets.
Memory of a TPU is what its compiler lets a program use (libtpu 0.0.42.1), a little less
than the chip has; that of an H200 is what its driver reports.
"""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental import topologies

from sra2_jax.errors import UserError, explained

GIB = 2**30
KNOWN = (
    "v4 and v5p: 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, ...; "
    "v5e and v6e: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; cpu:N; "
    "h200:N with tools.aot, from a checkout"
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
    compiler: str = "libtpu"  # the package that compiles for it


CUDA = f"jax-cuda{13 if importlib.util.find_spec('jax_cuda13_plugin') else 12}-pjrt"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1.2e12, 90e9, 30.75 * GIB),
        Chip("v5e", 197e12, 0.819e12, 100e9, 15.75 * GIB),
        Chip("v5p", 459e12, 2.765e12, 200e9, 95.74 * GIB),
        Chip("v6e", 918e12, 1.64e12, 200e9, 31.25 * GIB),
        Chip("a100", 312e12, 2.039e12, 600e9, 80e9, CUDA),
        Chip("h100", 989e12, 3.35e12, 900e9, 80e9, CUDA),
        Chip("h200", 989e12, 4.8e12, 900e9, 140.4 * GIB, CUDA),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip that a device calls itself, as "TPU v5 lite"; None of others."""
    name = kind.lower().replace(" lite", "e").replace("tpu v5p", "v5p")
    name = "v5p" if name == "tpu v5" else name
    return next((chip for chip in CHIPS.values() if chip.name in name), None)


def compile_only() -> None:
    """Use no device of this machine: of TPUs and GPUs only the compilers are needed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # "no GPU found", of the plugin
    jax.config.update("jax_platforms", "cpu")


def compiler(chip: Chip | None) -> str:
    """What compiles for a chip, in words; a CPU's compiler is JAX's own."""
    extra = f", {chip.compiler} {version(chip.compiler)}" if chip else ""
    return f"jax {jax.__version__}{extra}"


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """The devices of a topology, "v5e:4x4" or "cpu:8", and their chip; CPUs have none.

    Raises UserError: there is no such topology, or no libtpu.
    """
    name, _, shape = topology.partition(":")
    if name == "cpu" and shape.isdigit() and int(shape):
        with contextlib.suppress(RuntimeError):  # JAX runs already, with what it has
            jax.config.update("jax_num_cpu_devices", int(shape))
        if len(devices := jax.devices("cpu")) < int(shape):
            have = f"this process has {len(devices)} devices"
            raise UserError(f"--topology={topology}: {have}")
        return devices[: int(shape)], None
    unknown, chip = f"unknown --topology={topology}", CHIPS.get(name)
    if not chip or chip.compiler == CUDA or not shape:
        raise UserError(f"{unknown}: known are {KNOWN}")
    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            f"--topology={topology} needs the package libtpu: pip install -e '.[aot]'"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with explained(unknown, f"known are {KNOWN}", jax.errors.JaxRuntimeError):
        made = topologies.get_topology_desc(topology, "tpu", **options)
    return list(made.devices), chip
