"""Check this machine's numbers against known ones: sra2 verify DIR, or --steps.

Of every file in DIR (format: tests/golden/README.md) one or more cases computed by
public reference code. One line a case with its largest relative error; exit status 1 if
any is out of tolerance. Runs without TensorFlow.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
from sra2_jax.config import Latents, Model
from sra2_jax.data.pixels import center_crop
from sra2_jax.errors import UserError
from sra2_jax.metrics import moments
from sra2_jax.models import apply, shapes
from sra2_jax.models.dit import DiT
from sra2_jax.models.mmdit import MMDiT
from sra2_jax.programs.steps import verify_steps
from sra2_jax.transport import Transport, coefficients
from sra2_jax.weights import load_clip, load_dinov2, load_vae
from sra2_jax.weights.files import read_npz
from sra2_jax.weights.inception import from_torch_fidelity
from sra2_jax.weights.sit import from_reference
from sra2_jax.weights.vae import from_ldm

FLOAT32, TRAJECTORY32, FLOAT64 = 1e-4, 1e-3, 1e-6
FLOAT16_DISTANCES = 0.005  # in which ADM finds neighbours; absolute

Arrays = Mapping[str, np.ndarray]
# the name of a case, which is that of the expected array; ours; the tolerance
Cases = Iterator[tuple[str, ArrayLike, float]]


def relative_error(ours: ArrayLike, reference: ArrayLike) -> float:
    """max|a - b| / max|b|; infinite where the shapes differ."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape:
        return float("inf")
    if not b.size:
        return 0.0
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))


def nhwc(x: np.ndarray) -> jax.Array:
    """Channels last, on the device."""
    return jnp.asarray(np.moveaxis(x, 1, -1))


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def compiled(module: Any, params: Any, *inputs: Any, method: Any = None) -> Any:
    """A method's results, compiled: op by op it takes several times as long."""
    return jax.jit(partial(apply, module, method=method))(params, *inputs)


def network_of(data: Arrays) -> tuple[DiT, Mapping[str, Any]]:
    """The network of a golden file, and the arguments of the reference's class."""
    config = defaultdict(bool, json.loads(str(data["config"])))
    rms: Any = "rms" if config["use_rmsnorm"] else "layer"
    model = Model(
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        norm=rms,
        qk_norm=rms if config["use_qknorm"] else "none",
        mlp="swiglu" if config["use_swiglu"] else "gelu",
        rope=config["use_rope"],
        shift=not config["wo_shift"],
        learn_sigma=config["learn_sigma"],
    )
    sizes = [config[key] for key in ("input_size", "in_channels", "num_classes")]
    kind: Any = DiT
    if "context" in data:
        length, width = data["context"].shape[1:]
        kind = partial(MMDiT, text_tokens=length, text_width=width)
    return kind(model, *sizes), config


def sit(path: Path, data: Arrays) -> Cases:
    """The backbone with reference weights, REPA's or SRA's head on its block, or the
    gradient of its mean square."""
    network, config = network_of(data)
    weights = {k[2:]: data[k] for k in data if k.startswith("w/")}
    layers = {}
    for section, (prefix, _) in HEAD_NAMES.items():
        own = [k for k in weights if k.startswith(f"{prefix}.") and k.endswith(".bias")]
        if own:
            *widths, features = (weights[k].size for k in own)
            layers[section] = MLPHead(tuple(widths), features)
    width = network.model.width
    token = np.zeros((1, 1, width), np.float32), np.zeros((1, width), np.float32)
    wanted = {section: shapes(head, *token) for section, head in layers.items()}
    params, trees = from_reference(weights, network, wanted, HEAD_NAMES)
    depth = config["encoder_depth"] or config["align_depth"] or 1
    x, y = nhwc(data["x"]), jnp.asarray(data["context" if "context" in data else "y"])

    def square(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        found = apply(network, params, x, jnp.asarray(data["t"]), y, (depth,))
        mean = jnp.mean(jnp.square(found[0]))
        return mean, (mean, *found)

    run: Any = jax.grad(square, (0, 1), has_aux=True) if "grad_x" in data else square
    first, (loss, out, kept, c) = jax.jit(run)(params, x)
    results = {"out": nchw(out), "hidden": kept[depth], "loss": loss}
    if "grad_x" in data:
        parts = [np.ravel(leaf) for leaf in jax.tree.leaves(first[0])]
        results["grad_norm"] = np.linalg.norm(np.concatenate(parts))
        results["grad_x"] = nchw(first[1])
    for section, tree in trees.items():
        found = apply(layers[section], tree, kept[depth], c)
        results["z"] = results["projected"] = found
    if "target" in data:
        losses = elementwise("cosine", results["z"], jnp.asarray(data["target"]), 0.0)
        results["projection_loss"] = jnp.mean(losses) - 1  # REPA's is -cos
    for name in sorted(data.keys() - {"config", "x", "t", "y", "context", "target"}):
        if not name.startswith("w/"):
            yield name, results[name], FLOAT32


def vae(path: Path, data: Arrays) -> Cases:
    """AutoencoderKL loaded from the folder's diffusers files."""
    model, params = load_vae(str(path.parent))
    image, latent = nhwc(data["image"]), nhwc(data["latent"])
    yield "moments", nchw(compiled(model, params, image, method="moments")), FLOAT32
    mean, std = compiled(model, params, image, method="encode")
    yield "mean", nchw(mean), FLOAT32
    yield "std", nchw(std), FLOAT32
    yield "decoded", nchw(compiled(model, params, latent, method="decode")), FLOAT32


def ldm_vae(path: Path, data: Arrays) -> Cases:
    """The autoencoder of latent-diffusion under its own names, and its latents
    normalised by channel."""
    mean, std = (tuple(data[f"channel_{k}"].tolist()) for k in ("mean", "std"))
    factor = float(data["multiplier"])
    weights = {k[2:]: data[k] for k in data if k.startswith("w/")}
    model, params = from_ldm(
        weights, scaling_factor=factor, latents_mean=mean, latents_std=std
    )
    found = compiled(model, params, nhwc(data["image"]), method="encode")
    yield "mean", nchw(found[0]), FLOAT32
    yield "std", nchw(found[1]), FLOAT32
    decoded = compiled(model, params, nhwc(data["latent"]), method="decode")
    yield "decoded", nchw(decoded), FLOAT32
    latents = Latents(channels=len(mean), scaling_factor=factor, mean=mean, std=std)
    scaled = latents.scale * (found[0] - latents.shift)
    yield "mean_normalised", nchw(scaled), FLOAT32


def transformers(path: Path, data: Arrays) -> Cases:
    """DINOv2 or CLIP's text encoder, of the folder's transformers files."""
    folder = str(path.parent)
    if "input_ids" in data:
        states = compiled(*load_clip(folder), jnp.asarray(data["input_ids"]))
    else:
        module, params = load_dinov2(folder)  # resizes its table as transformers does:
        module = module.clone(antialias=False)
        states = compiled(module, params, nhwc(data["pixel_values"]))
    yield "last_hidden_state", states, FLOAT32


def samplers(path: Path, data: Arrays) -> Cases:
    """Trajectories on the analytic fields of the golden README, in both precisions."""

    def field(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        k = jnp.where(y == 1000, -1, y).reshape(-1, 1, 1, 1).astype(x.dtype)
        t = t.reshape(-1, 1, 1, 1)
        return 0.5 * x * jnp.cos(2 * t) + 0.1 * (k + 1) * jnp.sin(3 * x) + t

    def both(x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = field(x, t, y)
        return v, 0.8 * v + 0.05 * jnp.cos(x) + 0.1 * t.reshape(-1, 1, 1, 1)

    paths: dict[str, Any] = {"linear": "linear", "cosine": "gvp", "vp": "vp"}
    for dtype, tolerance in (("float32", TRAJECTORY32), ("float64", FLOAT64)):
        with jax.enable_x64(dtype == "float64"):
            for case in (k for k in data if "|" in k):
                method, path_name, *numbers = case.split("|")
                scales: Any = [float(number.strip("cfig")) for number in numbers]
                head = sampler.Guidance(*scales[3:])
                run = partial(
                    sampler.sample,
                    field if head.scale == 1 else both,
                    null=1000,
                    method=method,
                    steps=int(data["steps"]),
                    transport=Transport(paths[path_name]),
                    guidance=sampler.Guidance(*scales[:3]),
                    head=head,
                    noise=jnp.asarray(data["noise"], dtype).__getitem__,
                )
                x, y = jnp.asarray(data["latents"], dtype), jnp.asarray(data["y"])
                out = jax.jit(run)(x, y)
                yield case, out, tolerance


def interpolants(path: Path, data: Arrays) -> Cases:
    """alpha, sigma and derivatives; the reference's time runs the other way."""
    signs = {"alpha": 1, "sigma": 1, "d_alpha": -1, "d_sigma": -1}
    with jax.enable_x64(True):
        for name in sorted({k.split("|")[0] for k in data if "|" in k}):
            values = coefficients(name, 1 - jnp.asarray(data["t"], "float64"))
            for (key, sign), ours in zip(signs.items(), values, strict=True):
                yield f"{name}|{key}", sign * ours, FLOAT64


def alignment_losses(path: Path, data: Arrays) -> Cases:
    """Means of the elementwise losses and of 1 - cos over channels."""
    sides = jnp.asarray(data["a"]), jnp.asarray(data["b"])
    tokens = jnp.asarray(data["tokens_a"]), jnp.asarray(data["tokens_b"])
    yield "smooth_l1_beta005", jnp.mean(elementwise("smooth_l1", *sides, 0.05)), FLOAT32
    for loss, pair in (("l1", sides), ("l2", sides), ("cosine", tokens)):
        yield loss, jnp.mean(elementwise(loss, *pair, 0.0)), FLOAT32


def crops(path: Path, data: Arrays) -> Cases:
    """ADM's centre crop, exact."""
    for case in (k for k in data if k.startswith("out_")):
        _, number, size = case.split("_")
        yield case, center_crop(data[f"in_{number}"], int(size)), 0.0


def adm_metrics(path: Path, data: Arrays) -> Cases:
    """FID, sFID, Inception Score, Precision and Recall of ADM's evaluator."""
    for case, of in (("fid", ""), ("sfid", "spatial_")):
        samples, real = (moments.gaussian(data[of + x]) for x in ("samples", "ref"))
        yield case, moments.frechet_distance(*samples, *real), FLOAT64
    for case, split in (("all", len(data["probs"])), ("50", 50)):
        score = moments.InceptionScore(split)
        score.add(data["probs"])
        yield f"inception_score_split_{case}", score.value(), FLOAT32
    values = moments.precision_recall(data["ref"], data["samples"])
    for case, value in zip(("precision", "recall"), values, strict=True):
        yield case, value, FLOAT16_DISTANCES / float(data[case])


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


def inception(path: Path, data: Arrays) -> Cases:
    """Inception's features and logits."""
    network, params = from_torch_fidelity(inception_weights(data), path)
    out = compiled(network, params, data["images"])
    yield "pool3", out.pool, FLOAT32
    yield "spatial7", out.spatial, FLOAT32
    yield "logits_unbiased", out.logits, FLOAT32


# a key of a golden file -> the check that it calls for
CHECKS: dict[str, Callable[[Path, Arrays], Cases]] = {
    "w/x_embedder.proj.weight": sit,
    "moments": vae,
    "mean_normalised": ldm_vae,
    "last_hidden_state": transformers,
    "latents": samplers,
    "linear|alpha": interpolants,
    "smooth_l1_beta005": alignment_losses,
    "in_0": crops,
    "inception_score_split_all": adm_metrics,
    "logits_unbiased": inception,
}


def verify(folder: Path, strict: bool = False) -> int:
    """Check every .npz below `folder`; print a line a case; return the exit status.

    strict: a kind that is not covered is a failure.

    Raises UserError: no golden file in `folder`.
    """
    if not (files := sorted(folder.rglob("*.npz"))):
        raise UserError(f"{folder} holds no golden .npz files: name their folder")
    passed = []
    for path in files:
        name = str(path.relative_to(folder))
        try:
            data = read_npz(path)
            check = next((check for key, check in CHECKS.items() if key in data), None)
            if check is None:
                print(f"{name}: kind not covered yet")
                passed += [False] * strict
                continue
            for case, ours, tolerance in check(path, data):
                error = relative_error(ours, data[case])
                passed.append(error <= tolerance)  # false for NaN
                verdict = "ok" if passed[-1] else "FAILED"
                print(f"{name}: {case}: {error:.1e} (<= {tolerance:.0e}) {verdict}")
        except (BadZipFile, KeyError, OSError, ValueError) as error:
            passed.append(False)
            print(f"{name}: FAILED: {type(error).__name__}: {error}")
    device, good = jax.devices()[0], sum(passed)
    print(
        f"{good} passed, {len(passed) - good} failed; jax {jax.__version__} on "
        f"{device.platform} ({device.device_kind})"
    )
    return int(good < len(passed))


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="DIR", help="folder of golden files")
    add("--strict", action="store_true", help="a kind that is not covered fails")
    steps = "instead: train SiT-B/2 so far, and compare (%(const)s)"
    add("--steps", type=int, nargs="?", const=100, metavar="N", help=steps)
    arguments = parser.parse_args()
    if arguments.steps:
        return verify_steps(arguments.steps)
    if not arguments.folder:
        parser.error("name a folder of golden files, or --steps")
    # Accelerators round float32 products to bf16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return verify(arguments.folder, arguments.strict)
