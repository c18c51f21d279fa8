"""Published weights of the Inception network, in torch-fidelity's names."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sra2_jax.errors import UserError, explained
from sra2_jax.models import shapes
from sra2_jax.models.inception import Inception
from sra2_jax.storage import new_file, sha256
from sra2_jax.weights import files, tree
from sra2_jax.weights.tree import Params

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
HOW = (
    f"download {URL}, then pip install -e '.[torch]' and python -m sra2_jax convert "
    "inception weights-inception-2015-12-05-6726825d.pth --out=inception.safetensors"
)
EPSILON = 1e-3  # of the batch norms
NORM = ("weight", "bias", "running_mean", "running_var")


def load_inception(source: str) -> tuple[Inception, Params]:
    """The network of FID with its published weights, float32: torch-fidelity's file,
    which PyTorch reads, or what `convert inception` made of it.

    Raises UserError: no such file, a damaged one, or weights of another network.
    """
    path = Path(source).expanduser()
    return from_torch_fidelity(_read(path), path)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file by torch-fidelity's names."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, the Inception weights of FID: {HOW}")
    # torch's convention: NAME-HASH.pth, the first digits of the file's SHA-256
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised and not sha256(path).startswith(promised[1]):
        raise UserError(
            f"{path}: damaged, its SHA-256 does not begin with {promised[1]}: "
            "download it again"
        )
    return files.read_file(path).sets.get("unnamed", {})


def convert_inception(file: Path, out: str) -> None:
    """Write the weights as .safetensors or .npz, which need no PyTorch."""
    path = new_file(out, *files.WRITTEN)
    weights = _read(file)
    from_torch_fidelity(weights, file)  # refuses another network's
    files.write_file(path, weights, {"source": file.name, "sha256": sha256(file)})
    print(f"{out}: {len(weights)} tensors of {file.name}")


def from_torch_fidelity(
    weights: Mapping[str, np.ndarray], source: Path
) -> tuple[Inception, Params]:
    """Fold each batch norm into its convolution, in float64. Raises UserError: names or
    shapes that are not this network's."""
    complaint = f"{source}: not the Inception network of FID ({HOW})"
    # Without PyTorch's counters, and the bias, which no metric uses.
    rest = {k: v for k, v in weights.items() if np.ndim(v) and k != "fc.bias"}
    with explained(complaint, kinds=(KeyError, TypeError, ValueError)):
        for name in [key for key in rest if key.endswith(".conv.weight")]:
            layer = name.removesuffix(".conv.weight")
            gamma, beta, mean, variance = (
                rest.pop(f"{layer}.bn.{part}").astype(np.float64) for part in NORM
            )
            scale = gamma / np.sqrt(variance + EPSILON)
            rest[f"{layer}.weight"] = rest.pop(name) * scale[:, None, None, None]
            rest[f"{layer}.bias"] = beta - mean * scale
    network = Inception()
    wanted = shapes(network, np.zeros((1, 8, 8, 3), np.uint8))
    return network, tree.read(rest, wanted, str, complaint)
