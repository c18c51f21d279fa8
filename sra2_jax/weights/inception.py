"""Published weights of the Inception network, in torch-fidelity's names."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sra2_jax.errors import UserError
from sra2_jax.models.inception import Inception
from sra2_jax.weights import statedict
from sra2_jax.weights.files import Params, Shape

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
HOW = (
    f"download {URL}, then pip install -e '.[torch]' and python -m sra2_jax convert "
    "inception weights-inception-2015-12-05-6726825d.pth --out=inception.safetensors"
)
EPSILON = 1e-3  # of the batch norms
UNUSED = {"fc.bias": (1008,)}  # in the file, not in the metrics
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
    """Arrays of a file by torch-fidelity's names, checked; without counters.

    Raises:
      UserError: as `load_inception`.
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
    tree: Any = statedict.read_tree(path)
    weights = {k: v for k, v in tree.items() if not k.endswith(COUNTERS)}
    _check(weights, path)
    return weights


def sha256(path: str | Path) -> str:
    """Digest of a file, hexadecimal."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_inception(file: Path, out: Path) -> None:
    """Write the weights as .safetensors or .npz, which need no PyTorch.

    Raises:
      UserError: an unusable `file`; `out` exists or has another suffix.
    """
    statedict.check_writable(out)
    weights = read_weights(file)
    statedict.write_file(out, weights, {"source": file.name, "sha256": sha256(file)})
    print(f"{out}: {len(weights)} tensors of {file.name}")


def from_torch_fidelity(
    weights: Mapping[str, np.ndarray], source: Path
) -> tuple[Inception, Params]:
    """Fold each batch norm into its convolution, in float64.

    Raises:
      UserError: names, shapes or values that are not this network's; `source` is named.
    """
    weights = {k: v for k, v in weights.items() if not k.endswith(COUNTERS)}
    _check(weights, source)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for module in _modules():
        name = ".".join(module)
        if name == "fc":
            flat["fc", "kernel"] = np.asarray(weights["fc.weight"], np.float32).T
            continue
        gamma, beta, mean, variance = (
            np.asarray(weights[f"{name}.bn.{part}"], np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        kernel = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
        flat[*module, "kernel"] = kernel.astype(np.float32)
        flat[*module, "bias"] = (beta - mean * scale).astype(np.float32)
    return Inception(), traverse_util.unflatten_dict(flat)


def _modules() -> dict[tuple[str, ...], Shape]:
    """Each layer's path and its kernel's shape, without allocating one."""
    pixels = jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), pixels)
    flat = traverse_util.flatten_dict(variables["params"])
    return {p[:-1]: leaf.shape for p, leaf in flat.items() if p[-1] == "kernel"}


def _check(weights: Mapping[str, Any], source: Path) -> None:
    """Refuse anything but this network's names and shapes, and values not finite."""
    expected: dict[str, Shape] = dict(UNUSED)
    for path, shape in _modules().items():
        name = ".".join(path)
        if name == "fc":
            expected["fc.weight"] = shape[::-1]
            continue
        h, w, channels, features = shape
        expected[f"{name}.conv.weight"] = (features, channels, h, w)
        for part in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.bn.{part}"] = (features,)
    for name in sorted(expected.keys() | weights.keys()):
        wanted, found = expected.get(name), getattr(weights.get(name), "shape", None)
        if wanted != found:
            raise UserError(
                f"{source}: not the Inception network of FID: {name} is {found}, "
                f"{wanted} expected (torchvision's is another network): {HOW}"
            )
        if not np.isfinite(weights[name]).all():
            raise UserError(f"{source}: {name} is not finite: fetch the file again")
