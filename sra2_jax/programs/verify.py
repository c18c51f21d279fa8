"""Check this machine's numbers against known ones: python -m sra2_jax verify [DIR].

Metrics against closed forms; then, of every file in DIR (format:
tests/golden/README.md), one or more cases computed by public reference code. One line a
case with its largest relative error; exit status 1 if any is out of tolerance. Runs
without TensorFlow.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sra2_jax import sampler
from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.alignment.base import MLPHead, elementwise
from sra2_jax.command import Parser
from sra2_jax.data.pixels import center_crop
from sra2_jax.errors import UserError
from sra2_jax.metrics.moments import (
    InceptionScore,
    Moments,
    frechet_distance,
    gaussian,
)
from sra2_jax.metrics.neighbours import precision_recall
from sra2_jax.models.dit import DiT
from sra2_jax.transport import Transport, coefficients
from sra2_jax.weights import load_dinov2, load_vae
from sra2_jax.weights.inception import from_torch_fidelity
from sra2_jax.weights.sit import from_reference

FLOAT32, TRAJECTORY32, FLOAT64, EXACT = 1e-4, 1e-3, 1e-6, 1e-9
FLOAT16_DISTANCES = 0.005  # in which ADM finds neighbours; absolute

# (case, error, tolerance)
Result = tuple[str, float, float]
Arrays = Mapping[str, np.ndarray]
Check = Callable[[Path, Arrays], Iterator[Result]]


def relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """max|a - b| / max|b|; infinite where the shapes differ."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    if ours.shape != reference.shape:
        return float("inf")
    if not reference.size:
        return 0.0
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    scale = np.abs(b).max()
    return float(np.abs(a - b).max() / (scale if scale > 0 else 1.0))


def closed_forms() -> Iterator[Result]:
    """Two Gaussians whose covariances share their axes, in uneven batches; ten equally
    likely, certain classes; samples that fill one of two far clusters."""
    draw = np.random.default_rng(0)
    spreads, means = draw.uniform(0.5, 2, size=(2, 64)), draw.normal(size=(2, 64))
    points = draw.normal(size=(500, 64))
    # Whitened: mean 0 and covariance 1 up to rounding.
    points = np.linalg.qr(points - points.mean(axis=0))[0] * np.sqrt(499)
    sides = []
    for spread, mean in zip(spreads, means, strict=True):
        moments = Moments("closed form")
        for part in np.split(points * spread + mean, [1, 30, 400]):
            moments.add(part)
        sides += [moments.mean, moments.cov()]
    expected = np.sum((means[0] - means[1]) ** 2 + (spreads[0] - spreads[1]) ** 2)
    error = relative_error(frechet_distance(*sides), expected)
    yield "Frechet distance of two Gaussians", error, EXACT
    score = InceptionScore(100)
    for rows in np.split(np.tile(np.eye(10), (60, 1)), [250]):
        score.add(rows)
    error = relative_error(score.value(), 10.0)
    yield "Inception Score of 10 certain classes", error, EXACT
    cluster = draw.uniform(size=(200, 64)).astype(np.float32)
    real = np.concatenate([cluster, cluster + 100])
    samples = np.concatenate([cluster, cluster[:50] - 100])
    found = np.array(precision_recall(real, samples))
    error = relative_error(found, np.array([0.8, 0.5]))
    yield "precision 4/5 and recall 1/2", error, EXACT


def nhwc(x: np.ndarray) -> jax.Array:
    """Channels last, on the device."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def sit(path: Path, data: Arrays) -> Iterator[Result]:
    """The backbone with reference weights, and REPA's or SRA's head on its block."""
    config = json.loads(str(data["config"]))
    weights = {k[2:]: data[k] for k in data if k.startswith("w/")}
    settings, params, heads = from_reference(weights, HEAD_NAMES)
    model = DiT(heads=config["num_heads"], **settings)
    depth = config.get("encoder_depth", config.get("align_depth", 1))
    apply: Any = jax.jit(model.apply, static_argnums=4)
    out, kept, c = apply(
        {"params": params}, nhwc(data["x"]), data["t"], data["y"], (depth,)
    )
    yield "out", relative_error(out, nhwc(data["out"])), FLOAT32
    results = {"hidden": kept[depth]}
    for tree in heads.values():
        *widths, features = (layer["bias"].size for layer in tree.values())
        head = MLPHead(tuple(widths), features)
        projected: Any = head.apply({"params": tree}, kept[depth], c)
        results |= {"z": projected, "projected": projected}
    if "target" in data:
        losses = elementwise("cosine", results["z"], jnp.asarray(data["target"]), 0.0)
        results["projection_loss"] = jnp.mean(losses) - 1  # REPA's is -cos
    for name in sorted({"hidden", "projected", "projection_loss", "z"} & data.keys()):
        yield name, relative_error(results[name], data[name]), FLOAT32


def vae(path: Path, data: Arrays) -> Iterator[Result]:
    """AutoencoderKL loaded from the folder's diffusers files."""
    model, params = load_vae(str(path.parent))
    image, latent = nhwc(data["image"]), nhwc(data["latent"])

    def run(method: str, x: jax.Array) -> Any:
        return model.apply({"params": params}, x, method=method)

    mean, std = run("encode", image)
    for name, ours in {
        "moments": run("moments", image),
        "mean": mean,
        "std": std,
        "decoded": run("decode", latent),
    }.items():
        yield name, relative_error(ours, nhwc(data[name])), FLOAT32


def dinov2(path: Path, data: Arrays) -> Iterator[Result]:
    """The encoder loaded from the folder's transformers files."""
    module, params = load_dinov2(str(path.parent))
    # As transformers does, should the input have another size than the table.
    module = module.clone(antialias=False)
    tokens: Any = module.apply({"params": params}, nhwc(data["pixel_values"]))
    error = relative_error(tokens, data["last_hidden_state"])
    yield "last_hidden_state", error, FLOAT32


def samplers(path: Path, data: Arrays) -> Iterator[Result]:
    """Trajectories on the analytic field of the golden README, in both precisions."""

    def field(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        k = jnp.where(y == 1000, -1, y).reshape(-1, 1, 1, 1).astype(x.dtype)
        t = t.reshape(-1, 1, 1, 1)
        return 0.5 * x * jnp.cos(2 * t) + 0.1 * (k + 1) * jnp.sin(3 * x) + t

    steps = int(data["steps"])
    paths: dict[str, Any] = {"linear": "linear", "cosine": "gvp", "vp": "vp"}
    for dtype, tolerance in (("float32", TRAJECTORY32), ("float64", FLOAT64)):
        with jax.enable_x64(dtype == "float64"):
            noise = jnp.asarray(data["noise"], dtype).__getitem__
            for case in (k for k in data if "|" in k):
                method, path_name, scale, low, high = case.split("|")
                out = sampler.sample(
                    field,
                    jnp.asarray(data["latents"], dtype),
                    jnp.asarray(data["y"], "int32"),
                    null=1000,
                    method=method,
                    steps=steps,
                    transport=Transport(paths[path_name]),
                    guidance=sampler.Guidance(float(scale), float(low), float(high)),
                    noise=noise,
                )
                yield f"{case} {dtype}", relative_error(out, data[case]), tolerance


def interpolants(path: Path, data: Arrays) -> Iterator[Result]:
    """alpha, sigma and derivatives; the reference's time runs the other way."""
    names = ("alpha", "sigma", "d_alpha", "d_sigma")
    with jax.enable_x64(True):
        for name in sorted({k.split("|")[0] for k in data if "|" in k}):
            values = coefficients(name, 1 - jnp.asarray(data["t"], "float64"))
            for key, ours in zip(names, values, strict=True):
                sign = -1 if key.startswith("d_") else 1
                error = relative_error(sign * ours, data[f"{name}|{key}"])
                yield f"{name} {key}", error, FLOAT64


def alignment_losses(path: Path, data: Arrays) -> Iterator[Result]:
    """Means of the elementwise losses and of 1 - cos over channels."""
    for case, loss, a, b in (
        ("smooth_l1_beta005", "smooth_l1", "a", "b"),
        ("l1", "l1", "a", "b"),
        ("l2", "l2", "a", "b"),
        ("cosine", "cosine", "tokens_a", "tokens_b"),
    ):
        sides = jnp.asarray(data[a]), jnp.asarray(data[b])
        value = jnp.mean(elementwise(loss, *sides, 0.05))
        yield case, relative_error(value, data[case]), FLOAT32


def crops(path: Path, data: Arrays) -> Iterator[Result]:
    """ADM's centre crop, exact."""
    for case in (k for k in data if k.startswith("out_")):
        _, number, size = case.split("_")
        image = center_crop(data[f"in_{number}"], int(size))
        yield case, relative_error(image, data[case]), 0.0


def adm_metrics(path: Path, data: Arrays) -> Iterator[Result]:
    """FID, sFID, Inception Score, Precision and Recall of ADM's evaluator."""
    for case, a, b in (
        ("fid", "samples", "ref"),
        ("sfid", "spatial_samples", "spatial_ref"),
    ):
        distance = frechet_distance(*gaussian(data[a]), *gaussian(data[b]))
        yield case, relative_error(distance, data[case]), FLOAT64
    for case, split in (
        ("inception_score_split_all", len(data["probs"])),
        ("inception_score_split_50", 50),
    ):
        score = InceptionScore(split)
        score.add(data["probs"])
        yield case, relative_error(score.value(), data[case]), FLOAT32
    values = precision_recall(data["ref"], data["samples"])
    for case, value in zip(("precision", "recall"), values, strict=True):
        yield case, float(abs(value - data[case])), FLOAT16_DISTANCES


def inception_weights(data: Arrays) -> dict[str, np.ndarray]:
    """The weights of inception.npz, made by the recipe of the golden README."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(json.loads(str(data["shapes"])).items())):
        draw = np.random.RandomState(int(data["seed"]) * 100003 + i)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 0.5 + draw.rand(*shape)
        elif name.endswith(("running_mean", ".bias")):
            value = 0.1 * draw.randn(*shape)
        elif name.endswith("bn.weight"):
            value = 0.5 + draw.rand(*shape)
        else:
            value = draw.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        weights[name] = value.astype(np.float32)
    return weights


def inception(path: Path, data: Arrays) -> Iterator[Result]:
    """Inception's features and logits."""
    network, params = from_torch_fidelity(inception_weights(data), path)
    out: Any = jax.jit(network.apply)({"params": params}, data["images"])
    for case, ours in (
        ("pool3", out.pool),
        ("spatial7", out.spatial),
        ("logits_unbiased", out.logits),
    ):
        yield case, relative_error(ours, data[case]), FLOAT32


# a key of a golden file -> the check that it calls for
CHECKS: dict[str, Check] = {
    "w/y_embedder.embedding_table.weight": sit,
    "moments": vae,
    "last_hidden_state": dinov2,
    "latents": samplers,
    "linear|alpha": interpolants,
    "smooth_l1_beta005": alignment_losses,
    "in_0": crops,
    "inception_score_split_all": adm_metrics,
    "logits_unbiased": inception,
}


def passes(where: str, result: Result) -> bool:
    """Print a line about a case; whether it is within its tolerance."""
    case, error, tolerance = result
    ok = error <= tolerance  # false for NaN
    verdict = "ok" if ok else "FAILED"
    print(f"{where}: {case}: {error:.1e} (<= {tolerance:.0e}) {verdict}")
    return ok


def verify(folder: Path | None, strict: bool = False) -> int:
    """Check closed forms and every .npz below `folder`; print a line a case; return the
    exit status.

    Raises:
      UserError: no golden file in `folder`.
    """
    files = sorted(folder.rglob("*.npz")) if folder else []
    if folder and not files:
        raise UserError(f"{folder} holds no golden .npz files: name their folder")
    passed = [passes("closed form", result) for result in closed_forms()]
    skipped = 0
    for path in files:
        name = str(path.relative_to(folder or ""))
        try:
            # Opened here: np.load leaves a file that is no archive open.
            with path.open("rb") as file, np.load(file) as archive:
                data = dict(archive)
            checks = [check for key, check in CHECKS.items() if key in data]
            if not checks:
                skipped += 1
                print(f"{name}: kind not covered yet")
                continue
            passed += [passes(name, result) for result in checks[0](path, data)]
        except (BadZipFile, KeyError, OSError, ValueError) as error:
            passed.append(False)
            print(f"{name}: FAILED: {type(error).__name__}: {error}")
    device, good = jax.devices()[0], sum(passed)
    print(
        f"{good} passed, {len(passed) - good} failed, {skipped} files not covered; "
        f"jax {jax.__version__} on {device.platform} ({device.device_kind})"
    )
    return int(good < len(passed) or (strict and skipped > 0))


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="folder of golden files")
    add("--strict", action="store_true", help="fail on kinds not covered yet")
    arguments = parser.parse_args()
    # Accelerators round float32 products to bf16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return verify(arguments.folder, arguments.strict)
