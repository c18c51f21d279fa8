"""What a program ran on, for the files that it writes."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import sra2_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, Any]:
    """Packages, commit, devices, date."""
    root = Path(sra2_jax.__file__).parents[1]
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "sra2_jax": sra2_jax.__version__,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
