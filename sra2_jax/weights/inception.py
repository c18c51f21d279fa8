"""Published weights of the Inception network, in torch-fidelity's names."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sra2_jax.errors import UserError
from sra2_jax.models.inception import Inception
from sra2_jax.weights import files, tree
from sra2_jax.weights.tree import Params, Shape

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
COUNTERS = ".num_batches_tracked"  # of training, in PyTorch's file


def load_inception(source: str) -> tuple[Inception, Params]:
    """The network of FID with its published weights.

    source: the file that torch-fidelity and pytorch-fid publish
    (*-inception-2015-12-05-6726825d.pth; PyTorch reads it), or what
    `sra2_jax.programs.convert inception` made of it.

    Returns the module and its parameters, float32.

    Raises:
      UserError: no such file (the message says where to get it), a damaged one, or
        weights of another network.
    """
    path = Path(source).expanduser()
    return from_torch_fidelity(read_weights(path), path)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file by torch-fidelity's names, without counters.

    Raises:
      UserError: as `load_inception`, but for another network's file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, the Inception weights of FID: {HOW}")
    # torch's convention: NAME-HASH.pth, the first digits of the file's SHA-256
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised and not sha256(path).startswith(promised[1]):
        raise UserError(
            f"{path}: damaged, its SHA-256 does not begin with {promised[1]}: "
            "download it again"
        )
    return _without_counters(files.read_file(path).sets.get("unnamed", {}))


def sha256(path: str | Path) -> str:
    """Digest of a file, hexadecimal."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_inception(file: Path, out: Path) -> None:
    """Write the weights as .safetensors or .npz, which need no PyTorch.

    Raises:
      UserError: an unusable `file`; `out` exists or has another suffix.
    """
    files.check_writable(out)
    weights = read_weights(file)
    from_torch_fidelity(weights, file)  # refuses another network's
    files.write_file(out, weights, {"source": file.name, "sha256": sha256(file)})
    print(f"{out}: {len(weights)} tensors of {file.name}")


def from_torch_fidelity(
    weights: Mapping[str, np.ndarray], source: Path
) -> tuple[Inception, Params]:
    """Fold each batch norm into its convolution, in float64.

    Raises:
      UserError: names, shapes or values that are not this network's; `source` is named.
    """
    weights, network = _without_counters(weights), Inception()
    shapes = tree.shapes(network, np.zeros((1, 8, 8, 3), np.uint8))
    complaint = f"{source}: not the Inception network of FID ({HOW})"
    tree.check(weights, _published(tree.file_shapes(shapes, str)), complaint)
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{source}: {name} is not finite: fetch the file again")
    folded = {"fc.weight": weights["fc.weight"]}
    for name in (key for key in weights if key.endswith(".conv.weight")):
        layer = name.removesuffix(".conv.weight")
        gamma, beta, mean, variance = (
            np.asarray(weights[f"{layer}.bn.{part}"], np.float64) for part in NORM
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        folded[f"{layer}.weight"] = weights[name] * scale[:, None, None, None]
        folded[f"{layer}.bias"] = beta - mean * scale
    return network, tree.read(folded, shapes, str, complaint)


def _without_counters(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in weights.items() if not k.endswith(COUNTERS)}


def _published(folded: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes by their names in the file, of those with folded norms."""
    found: dict[str, Shape] = {"fc.bias": (1008,)}  # in the file, not in the metrics
    for name, shape in folded.items():
        layer, _, leaf = name.rpartition(".")
        if layer == "fc":
            found[name] = shape
        elif leaf == "weight":
            found[f"{layer}.conv.weight"] = shape
        else:
            found |= {f"{layer}.bn.{part}": shape for part in NORM}
    return found
