"""GPUs that are not there, compiled for by `tools.aot --topology=h200:8`.

XLA's CUDA plugin takes a description of the chip instead of a chip (jax issue 23971,
jax pull request 33542). It needs no CUDA libraries and no driver, only the plugin and
ptxas: `pip install -e '.[aot-gpu]'`. JAX asks the first device whether cuDNN's
attention may be used, so `present` answers for the device that is not there.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from jax.experimental import topologies

from sra2_jax.config import Model
from sra2_jax.errors import UserError

# What the driver says of an H200 SXM with 141 GB, in XLA's GpuTargetConfigProto.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""
CAPABILITY, CUDNN = (9, 0), 91000
TOOLS = {"jax_cuda12_plugin": "nvidia.cuda_nvcc", "jax_cuda13_plugin": "nvidia.cu13"}


def find_devices(n: int) -> list[Any]:
    """n devices of one machine. Raises UserError: the packages are missing."""
    plugin = next(filter(importlib.util.find_spec, TOOLS), None)
    tools = importlib.util.find_spec(TOOLS[plugin]) if plugin else None
    if not tools or not tools.submodule_search_locations:
        raise UserError(
            f"--topology=h200:{n} needs XLA's CUDA plugin and ptxas: "
            "pip install -e '.[aot-gpu]'"
        )
    folder = Path(next(iter(tools.submodule_search_locations)))
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # Kernels cannot be timed here: cuBLAS for every product instead of what wins.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    flags += f" --xla_gpu_cuda_data_dir={folder}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    made = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{n}"
    )
    return list(made.devices)


def attention(model: Model) -> Literal["cudnn", "xla"]:
    """What such a GPU would run, see `sra2_jax.attention.implementation`."""
    half = model.dtype == "bfloat16"
    return "cudnn" if half and model.attention != "xla" else "xla"


@contextlib.contextmanager
def present() -> Iterator[None]:
    """JAX takes such a GPU for the first device."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    answers: dict[str, Any] = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda text: version(text) <= CAPABILITY,
        "is_cuda_compute_capability_equal": lambda text: version(text) == CAPABILITY,
    }
    with mock.patch.multiple(fused, **answers):
        yield
