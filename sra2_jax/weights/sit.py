"""State dicts of the reference PyTorch code, to and from our trees, bit for bit.

Names and layouts are those of the `SiT` network (willisma/SiT) and of the heads that
REPA (sihyun-yu/REPA) and SRA (vvvvvjdy/SRA) add to it. SRA 2's head and heads that end
in a final layer have no published names and get names in the same style.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sra2_jax.errors import UserError
from sra2_jax.models.dit import sincos_positions

Path = tuple[str, ...]
# our linear layers -> their names: one, or of a stacked layer one for each block
Table = dict[Path, list[str]]
# (name, shape with None for any) -> the float32 tensor of that name, its shape checked
Take = Callable[..., np.ndarray]

PATCH = "x_embedder.proj"
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
TIME_FEATURES = 256

OUTER: dict[Path, str] = {
    ("time_in",): "t_embedder.mlp.0",
    ("time_out",): "t_embedder.mlp.2",
    ("final", "modulation"): "final_layer.adaLN_modulation.1",
    ("final", "linear"): "final_layer.linear",
}
# our layer of a block -> its name after "blocks.N."
BLOCK = {
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
# section of config.align -> name of its head, and of the head's linear layers: in a
# sequence with SiLU between them, but for SRA's
HEADS = {"vae": "sra2_head", "encoder": "projectors.0", "teacher": "ap_head"}
HEAD_FINAL: dict[Path, str] = {
    ("final", "modulation"): "final_layer.adaLN_modulation.1",
    ("final", "linear"): "final_layer.linear",
}

# The reference averages its fixed table into the EMA, where rounding moves it by 1.6e-4
# over a training; bfloat16 rounds it by 2e-3.
POSITION_TOLERANCE = 5e-3


def from_reference(
    weights: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Convert the state dict of a SiT, with or without heads.

    Args:
      weights: names -> float arrays of at most 32 bits; patch kernel (out, in, h, w),
        matrices (out, in). Prefixes of PyTorch's wrappers are dropped, and the
        `decoder_blocks` of older REPA files follow their `blocks`.

    Returns:
      (settings, params, heads): the DiT attributes that the shapes determine (all but
      `heads`, which no shape shows); the float32 tree of `models.dit.DiT`; section of
      config.align -> tree of its `models.heads.MLPHead`.

    Raises:
      UserError: missing or foreign names, shapes that do not fit each other, another
        position table than the fixed one.
    """
    weights = plain_names(weights)
    depth = min(1 + _highest(r"blocks\.(\d+)\.", weights), len(weights))
    network = _network_layers(depth)
    heads = {name: _find_head(name, weights) for name in HEADS}
    _check_names(weights, [network, *heads.values()])

    def take(name: str, *shape: int | None) -> np.ndarray:
        return _float32(name, weights[name], shape)

    patch = take(f"{PATCH}.weight", None, None, None, None)
    width, channels, p, _ = patch.shape
    patch = take(f"{PATCH}.weight", width, channels, p, p)
    hidden = take("blocks.0.mlp.fc1.bias", None).size
    outputs = take("final_layer.linear.bias", None).size
    if outputs not in (p * p * channels, 2 * p * p * channels):
        raise UserError(
            f"final_layer.linear has {outputs} outputs, expected {p * p * channels} "
            f"({p}x{p} patches of {channels} channels), or twice that (learn_sigma)"
        )
    params = _read(take, network, _network_sizes(width, hidden, outputs))
    params["label"] = {"embedding": take(LABELS, None, width)}
    kernel = patch.transpose(2, 3, 1, 0).reshape(p * p * channels, width)
    params["patch"] = {"kernel": kernel, "bias": take(f"{PATCH}.bias", width)}
    settings = {
        "size": _grid(take(POSITIONS, 1, None, width)) * p,
        "channels": channels,
        "patch_size": p,
        "width": width,
        "depth": depth,
        "num_classes": len(params["label"]["embedding"]) - 1,
        "mlp_ratio": hidden / width,
        "learn_sigma": outputs == 2 * p * p * channels,
    }
    trees = {
        name: _read(take, table, _head_sizes(take, table, width))
        for name, table in heads.items()
        if table
    }
    return settings, params, trees


def to_reference(
    params: Mapping[str, Any], heads: Mapping[str, Any], *, size: int, patch_size: int
) -> dict[str, np.ndarray]:
    """The exact inverse of `from_reference`: float32 and contiguous, in SiT's names.

    Args:
      params: tree of `models.dit.DiT`; heads: section of config.align -> tree of
        `models.heads.MLPHead`.
      size: side of the latent grid.
    """
    p, width = patch_size, params["patch"]["bias"].size
    kernel = np.asarray(params["patch"]["kernel"]).reshape(p, p, -1, width)
    weights = {
        POSITIONS: sincos_positions(width, size // p)[None],
        f"{PATCH}.weight": kernel.transpose(3, 2, 0, 1),
        f"{PATCH}.bias": params["patch"]["bias"],
        LABELS: params["label"]["embedding"],
    }
    depth = len(params["blocks"]["qkv"]["bias"])
    parts = [(params, _network_layers(depth))]
    for name, tree in heads.items():
        linear = sum(layer.startswith("linear") for layer in tree)
        parts.append((tree, _head_layers(name, linear, "final" in tree)))
    for tree, table in parts:
        flat = traverse_util.flatten_dict(tree)
        for path, names in table.items():
            for ours, leaf in (("kernel", "weight"), ("bias", "bias")):
                array = np.asarray(flat[*path, ours])
                rows = array if path[0] == "blocks" else array[None]
                for name, row in zip(names, rows, strict=True):
                    weights[f"{name}.{leaf}"] = row.T
    return {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}


def reverse_time(
    params: Mapping[str, Any], time_scale: float, velocity: bool
) -> dict[str, Any]:
    """The network that at time t computes what `params` compute at 1 - t.

    SiT's own code runs from noise at 0 to data at 1, ours (REPA's, SRA's) from data to
    noise. The first time layer takes cos and sin of w t; those of w (1 - t) are linear
    in them, so its kernel is changed, exactly but for rounding to float32. A `velocity`
    changes its sign too. Applying this twice gives the same network back.

    Args:
      params: tree of `models.dit.DiT`; time_scale: its factor on t.
    """
    half = TIME_FEATURES // 2
    angles = time_scale * np.exp(-np.log(10000.0) * np.arange(half) / half)[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    old = np.asarray(params["time_in"]["kernel"], np.float64)
    kernel = np.concatenate(
        [cos * old[:half] + sin * old[half:], sin * old[:half] - cos * old[half:]]
    )
    result = dict(params)
    result["time_in"] = params["time_in"] | {"kernel": kernel.astype(np.float32)}
    if velocity:
        linear = {k: -np.asarray(v) for k, v in params["final"]["linear"].items()}
        result["final"] = params["final"] | {"linear": linear}
    return result


def plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The names without PyTorch's wrappers; REPA's `decoder_blocks` as more `blocks`.

    Raises:
      UserError: two names become one.
    """
    plain = {
        re.sub(r"(?<![^.])(module|_orig_mod)\.", "", name): tensor
        for name, tensor in weights.items()
    }
    first = 1 + _highest(r"blocks\.(\d+)\.", plain)
    plain = {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v
        for k, v in plain.items()
    }
    if len(plain) < len(weights):
        raise UserError("holds the same tensor under several prefixes: save one")
    return plain


def _highest(pattern: str, names: Iterable[str]) -> int:
    """The largest number that `pattern` finds at the beginning of a name, or -1."""
    found = (re.match(pattern, name) for name in names)
    return max((int(m[1]) for m in found if m), default=-1)


def _network_layers(depth: int) -> Table:
    table = {path: [name] for path, name in OUTER.items()}
    for ours, name in BLOCK.items():
        table["blocks", ours] = [f"blocks.{i}.{name}" for i in range(depth)]
    return table


def _network_sizes(d: int, hidden: int, outputs: int) -> dict[Path, tuple[int, int]]:
    """(inputs, outputs) of each layer."""
    return {
        ("time_in",): (TIME_FEATURES, d),
        ("time_out",): (d, d),
        ("final", "modulation"): (d, 2 * d),
        ("final", "linear"): (d, outputs),
        ("blocks", "qkv"): (d, 3 * d),
        ("blocks", "attention_out"): (d, d),
        ("blocks", "mlp_in"): (d, hidden),
        ("blocks", "mlp_out"): (hidden, d),
        ("blocks", "modulation"): (d, 6 * d),
    }


def _head_layers(name: str, linear: int, final: bool) -> Table:
    prefix, table = HEADS[name], Table()
    for i in range(linear):
        last = f"linear{i + 1}" if name == "teacher" else str(2 * i)
        table[f"linear_{i}",] = [f"{prefix}.{last}"]
    if final:
        table |= {path: [f"{prefix}.{last}"] for path, last in HEAD_FINAL.items()}
    return table


def _find_head(name: str, weights: Mapping[str, Any]) -> Table:
    """The layers of a head that a state dict has; empty where it has none."""
    prefix = HEADS[name]
    if name == "teacher":
        linear = _highest(rf"{prefix}\.linear(\d+)\.", weights)
    else:
        linear = _highest(rf"{re.escape(prefix)}\.(\d+)\.", weights) // 2 + 1
    final = any(k.startswith(f"{prefix}.final_layer.") for k in weights)
    return _head_layers(name, min(max(linear, 0), len(weights)), final)


def _head_sizes(take: Take, table: Table, d: int) -> dict[Path, tuple[int, int]]:
    """(inputs, outputs) of each layer on tokens and a condition of width d."""
    sizes: dict[Path, tuple[int, int]] = {}
    last = d
    for path, (name,) in table.items():
        if path == ("final", "modulation"):
            sizes[path] = d, 2 * last
        else:
            sizes[path] = last, take(f"{name}.bias", None).size
            last = sizes[path][1]
    return sizes


def _check_names(weights: Mapping[str, Any], tables: Iterable[Table]) -> None:
    layers = [n for table in tables for names in table.values() for n in names]
    wanted = [LABELS, POSITIONS]
    wanted += [f"{n}.{leaf}" for n in (PATCH, *layers) for leaf in ("weight", "bias")]
    faults = []
    for verb, names in (
        ("lacks", [n for n in wanted if n not in weights]),
        ("has the foreign", sorted(weights.keys() - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{verb} {', '.join(names[:3])}{more}")
    if faults:
        raise UserError(f"not a SiT checkpoint: it {'; it '.join(faults)}")


def _float32(name: str, tensor: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """The tensor in float32, refused where that changes it or the shape is another."""
    if not jnp.issubdtype(tensor.dtype, np.floating) or tensor.dtype.itemsize > 4:
        raise UserError(f"{name} is {tensor.dtype}: save it as float32 or smaller")
    fits = len(shape) == tensor.ndim and all(
        b in (None, a) for a, b in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = str(shape).replace("None", "any")
        raise UserError(f"{name} has shape {tensor.shape}, expected {wanted}")
    return np.asarray(tensor, np.float32)


def _read(
    take: Take, table: Table, sizes: Mapping[Path, tuple[int, int]]
) -> dict[str, Any]:
    """The tree of linear layers, those of the blocks stacked."""
    flat = {}
    for path, names in table.items():
        inputs, outputs = sizes[path]
        kernels = [take(f"{name}.weight", outputs, inputs).T for name in names]
        biases = [take(f"{name}.bias", outputs) for name in names]
        stacked = path[0] == "blocks"
        flat[*path, "kernel"] = np.stack(kernels) if stacked else kernels[0]
        flat[*path, "bias"] = np.stack(biases) if stacked else biases[0]
    return traverse_util.unflatten_dict(flat)


def _grid(positions: np.ndarray) -> int:
    """Tokens on a side of a (1, tokens, width) table that must be the fixed one."""
    _, tokens, width = positions.shape
    grid = math.isqrt(tokens)
    if grid**2 == tokens and width % 4 == 0:
        error = np.abs(positions[0] - sincos_positions(width, grid)).max()
        if error <= POSITION_TOLERANCE:
            return grid
    raise UserError(f"{POSITIONS} is not the fixed sine-cosine table: unsupported")
