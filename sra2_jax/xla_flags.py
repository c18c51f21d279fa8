"""What XLA is told on each platform, in one place; the environment's own values win.

Tried on compiled programs and left out: the latency-hiding scheduler of GPUs (on
anyway), a larger scoped vmem on TPUs (more traffic), see docs/aot.md.
"""

import importlib.util
import os

# A block of XL/2 is 42 MB in bfloat16: gathered and reduced in one collective each.
BYTES = 2**27
GPU_FLAGS = (
    f"--xla_gpu_all_gather_combine_threshold_bytes={BYTES}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={BYTES}",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={BYTES}",
)
# JAX takes 75% of a GPU otherwise; XL/2 without rematerialisation wants more.
MEMORY_FRACTION = "0.92"


def set_flags() -> None:
    """Set them for this process; to be called before JAX looks for devices."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(importlib.util.find_spec(name) for name in plugins):
        given = os.environ.get("XLA_FLAGS", "")
        # Of a flag given twice XLA takes the last.
        os.environ["XLA_FLAGS"] = " ".join((*GPU_FLAGS, given)).strip()
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
