"""State dicts of the reference PyTorch code, to and from our trees, bit for bit.

Names and layouts are those of the `SiT` network (willisma/SiT), of LightningDiT
(hustvl/LightningDiT), which changes its blocks, and of the heads that
REPA (sihyun-yu/REPA) and SRA (vvvvvjdy/SRA) add to it. SRA 2's head and heads that end
in a final layer have no published names and get names in the same style; one that is a
final layer alone is Internal Guidance's `final_layer_xr`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sra2_jax.errors import UserError
from sra2_jax.models import shapes
from sra2_jax.models.block import rotations
from sra2_jax.models.dit import TIME_FEATURES, DiT, sincos_positions
from sra2_jax.weights import tree
from sra2_jax.weights.tree import Name, Params, Shape

POSITIONS = "pos_embed"
LABELS = "y_embedder.embedding_table.weight"
ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
FOREIGN = "not a SiT checkpoint"
FINAL = {
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
    "final.norm_final": "final_layer.norm_final",
}
EARLY = "final_layer_xr"  # Internal Guidance's head (CVL-UESTC/Internal-Guidance)
# our modules -> theirs
NAMES = FINAL | {
    "patch": "x_embedder.proj",
    "label": "y_embedder.embedding_table",
    "time_in": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2",
    "blocks.qkv": "blocks.{i}.attn.qkv",
    "blocks.attention_out": "blocks.{i}.attn.proj",
    "blocks.q_norm": "blocks.{i}.attn.q_norm",
    "blocks.k_norm": "blocks.{i}.attn.k_norm",
    "blocks.norm1": "blocks.{i}.norm1",
    "blocks.norm2": "blocks.{i}.norm2",
    "blocks.mlp_in": "blocks.{i}.mlp.fc1",
    "blocks.mlp_out": "blocks.{i}.mlp.fc2",
    "blocks.gated_in": "blocks.{i}.mlp.w12",
    "blocks.gated_out": "blocks.{i}.mlp.w3",
    "blocks.modulation": "blocks.{i}.adaLN_modulation.1",
}
# section of config.align -> the name of its head, and of the head's i-th linear layer
# with {twice} = 2 i (in a sequence with SiLU between them) or {next} = i + 1
HeadNames = Mapping[str, tuple[str, str]]

# The reference averages its fixed table into the EMA, where rounding moves it by 1.6e-4
# over a training; bfloat16 rounds it by 2e-3.
POSITION_TOLERANCE = 5e-3


def from_reference(
    weights: Mapping[str, np.ndarray], names: HeadNames, size: int | None = None
) -> tuple[dict[str, Any], Params, dict[str, Params]]:
    """Convert the state dict of a SiT, with or without heads.

    Args:
      weights: names -> float arrays; patch kernel (out, in, h, w), matrices (out, in).
        Prefixes of PyTorch's wrappers are dropped, and the `decoder_blocks` of older
        REPA files follow their `blocks`.
      names: of the heads, see `alignment.HEAD_NAMES`.
      size: of the latent grid, for a file without the fixed table of positions.

    Returns:
      (settings, params, heads): the DiT attributes that the shapes determine (`heads`
      is shown by QK-norm alone); the float32 tree of `models.dit.DiT`; section of
      config.align -> tree of its head.

    Raises UserError: missing or foreign names, shapes that do not fit each other,
    another position table than the fixed one.
    """
    weights = _plain_names(weights)
    settings = _settings(weights, size)
    weights.pop(POSITIONS, None)
    if settings["rope"]:
        _check_rotations(
            [weights.pop(name) for name in ROTATIONS if name in weights],
            settings["size"] // settings["patch_size"],
        )
    heads = {}
    for section, (prefix, linear) in names.items():
        own = {k: weights.pop(k) for k in list(weights) if k.startswith(f"{prefix}.")}
        if own:
            heads[section] = _head(own, prefix, _head_name(prefix, linear))
    if own := {k: weights.pop(k) for k in list(weights) if k.startswith(f"{EARLY}.")}:
        heads["vae"] = _head(own, EARLY, _early_name)
    network = DiT(**{"heads": 1} | settings)
    x = np.zeros((1, network.size, network.size, network.channels), np.float32)
    t = np.zeros(1, np.float32)
    wanted = shapes(network, x, t, t.astype(int))
    rule, patch = NAMES.__getitem__, network.patch_size
    return settings, tree.read(weights, wanted, rule, FOREIGN, patch), heads


def to_reference(
    params: Params,
    heads: Mapping[str, Params],
    names: HeadNames,
    *,
    size: int,
    patch_size: int,
    rope: int = 0,
) -> dict[str, np.ndarray]:
    """The exact inverse of `from_reference`: float32 and contiguous, in SiT's names;
    size: side of the latent grid; rope: attention heads of a network that has it."""
    width, grid = params["patch"]["bias"].size, size // patch_size
    weights = {POSITIONS: sincos_positions(width, grid)[None]}
    if rope:
        tables = rotations(width // rope, grid)
        weights |= dict(zip(ROTATIONS, tables, strict=True))
    weights |= tree.write(params, NAMES.__getitem__, patch_size)
    for section, head in heads.items():
        alone = section == "vae" and head.keys() == {"final"}
        name = _early_name if alone else _head_name(*names[section])
        weights |= tree.write(head, name)
    return {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}


def reverse_time(params: Params, time_scale: float, velocity: bool) -> Params:
    """The network that at time t computes what `params` compute at 1 - t.

    SiT's own code runs from noise at 0 to data at 1, ours (REPA's, SRA's) from data to
    noise. The first time layer takes cos and sin of w t; those of w (1 - t) are linear
    in them, so its kernel is changed, exactly but for rounding to float32. A `velocity`
    changes its sign too. Applying this twice gives the same network back.

    time_scale: the network's factor on t.
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


def _plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Without wrappers of PyTorch; `decoder_blocks` of REPA as more `blocks`."""
    plain = {
        re.sub(r"(?<![^.])(module|_orig_mod)\.", "", name): tensor
        for name, tensor in weights.items()
    }
    first = _blocks(plain)
    plain = {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v
        for k, v in plain.items()
    }
    if len(plain) < len(weights):
        raise UserError("holds the same tensor under several prefixes: save one")
    return plain


def _blocks(names: Iterable[str]) -> int:
    """How many blocks the names count to."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def _settings(weights: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """The DiT attributes that the shapes determine, each from one tensor."""

    def shape(name: str, rank: int) -> Shape:
        found = np.shape(weights.get(name, 0))
        if len(found) != rank or 0 in found:
            raise UserError(f"{FOREIGN}: {name} is {found or 'missing'}")
        return found

    width, channels, p, _ = shape("x_embedder.proj.weight", 4)
    rows, _ = shape(LABELS, 2)
    swiglu = "blocks.0.mlp.w3.weight" in weights
    if swiglu:
        _, hidden = shape("blocks.0.mlp.w3.weight", 2)
        hidden = math.ceil(1.5 * hidden)  # of which SwiGLU has 2/3
    else:
        (hidden,) = shape("blocks.0.mlp.fc1.bias", 1)
    (modulation,) = shape("blocks.0.adaLN_modulation.1.bias", 1)
    of_head = [f"blocks.0.attn.q_norm.{leaf}" in weights for leaf in ("weight", "bias")]
    # What is normalised shows the size of a head.
    found = {}
    if any(of_head):
        (size_of_head,) = shape("blocks.0.attn.q_norm.weight", 1)
        found["heads"] = width // size_of_head
    (outputs,) = shape("final_layer.linear.bias", 1)
    if size is None or POSITIONS in weights:
        _, tokens, _ = shape(POSITIONS, 3)
        size = _grid(weights[POSITIONS], tokens, width) * p
    return found | {
        "size": size,
        "channels": channels,
        "patch_size": p,
        "width": width,
        "depth": min(_blocks(weights), len(weights)),
        "num_classes": rows - 1,
        "mlp_ratio": hidden / width,
        "norm": "rms" if "blocks.0.norm1.weight" in weights else "layer",
        "qk_norm": ("none", "rms", "layer")[sum(of_head)],
        "mlp": "swiglu" if swiglu else "gelu",
        "rope": ROTATIONS[0] in weights,
        "shift": modulation != 4 * width,
        "learn_sigma": outputs == 2 * p * p * channels,
    }


def _grid(positions: np.ndarray, tokens: int, width: int) -> int:
    """Tokens on a side of a (1, tokens, width) table that must be the fixed one."""
    grid = math.isqrt(tokens)
    if positions.shape == (1, grid**2, width) and width % 4 == 0:
        error = np.abs(positions[0] - sincos_positions(width, grid)).max()
        if error <= POSITION_TOLERANCE:
            return grid
    raise UserError(f"{POSITIONS} is not the fixed sine-cosine table: unsupported")


def _check_rotations(tables: list[np.ndarray], grid: int) -> None:
    """Raise UserError where a file's RoPE is not the fixed one."""
    width = tables[0].shape[-1]
    ours = rotations(width, grid) if width % 4 == 0 else ()
    if [t.shape for t in tables] == [t.shape for t in ours] and all(
        np.abs(a - b).max() <= POSITION_TOLERANCE
        for a, b in zip(tables, ours, strict=True)
    ):
        return
    raise UserError(f"{ROTATIONS[0]} is not the fixed table of rotations: unsupported")


def _head_name(prefix: str, linear: str) -> Name:
    """Of a head's modules in the file."""

    def name(module: str) -> str:
        if module.startswith("linear_"):
            i = int(module.removeprefix("linear_"))
            return f"{prefix}.{linear.format(twice=2 * i, next=i + 1)}"
        return f"{prefix}.{FINAL.get(module, module)}"

    return name


def _early_name(module: str) -> str:
    return FINAL.get(module, module).replace("final_layer", EARLY)


def _head(own: Mapping[str, np.ndarray], prefix: str, name: Name) -> Params:
    """The tree of a head, from its tensors alone: nothing else shows its shapes."""
    known = *FINAL, *(f"linear_{i}" for i in range(len(own)))
    modules = {name(module): module for module in known}
    wanted = {}
    for key, tensor in own.items():
        stem, _, leaf = key.rpartition(".")
        module = modules.get(stem, stem.removeprefix(f"{prefix}."))
        shape = tensor.shape
        if leaf == "weight":
            leaf, shape = "kernel", (*shape[2:], *shape[1::-1])
        wanted[*module.split("."), leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree.read(own, traverse_util.unflatten_dict(wanted), name, FOREIGN)
