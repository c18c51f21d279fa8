"""State dicts of the reference PyTorch code, to and from our trees, bit for bit.

Names and layouts are those of the `SiT` network (willisma/SiT), of LightningDiT
(hustvl/LightningDiT), which changes its blocks, of REPA's MMDiT, and of the heads that
REPA (sihyun-yu/REPA) and SRA (vvvvvjdy/SRA) add. SRA 2's head and heads that end in a
final layer have no published names and get names in the same style.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sra2_jax.errors import UserError
from sra2_jax.models import shapes
from sra2_jax.models.block import rotations
from sra2_jax.models.dit import TIME_FEATURES, DiT, sincos_positions
from sra2_jax.models.mmdit import TEXT, MMDiT
from sra2_jax.weights import tree
from sra2_jax.weights.tree import Name, Params

POSITIONS = "pos_embed"
LABELS = "y_embedder.embedding_table.weight"
ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
FOREIGN = "no SiT of this config (its latents, model, perhaps learn_sigma)"
FINAL = {
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
    "final.norm_final": "final_layer.norm_final",
}
# Internal Guidance's name (CVL-UESTC/Internal-Guidance) of a head that is a final layer
# alone, and the one by the rule of the others.
ALONE = "final_layer_xr.", "sra2_head.final_layer."
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
# MMDiT's two streams; its last block lies apart here.
STREAMS = {"": "x_block", TEXT: "context_block"}
# section of config.align -> the name of its head, and of the head's i-th linear layer
# with {twice} = 2 i (in a sequence with SiLU between them) or {next} = i + 1
HeadNames = Mapping[str, tuple[str, str]]

# The reference averages its fixed table into the EMA, where rounding moves it by 1.6e-4
# over a training; bfloat16 rounds it by 2e-3.
POSITION_TOLERANCE = 5e-3


def from_reference(
    weights: Mapping[str, np.ndarray],
    network: DiT,
    heads: Mapping[str, Any],
    names: HeadNames,
    relabel: bool = False,
    resize: bool = False,
) -> tuple[Params, dict[str, Params]]:
    """Convert the state dict of a SiT, with or without heads.

    Args:
      weights: names -> arrays. Prefixes of PyTorch's wrappers are dropped, and the
        `decoder_blocks` of older REPA files follow their `blocks`.
      network: whose they must be; heads: shapes of those wanted, by the section of
        config.align; names: of all, see `alignment.HEAD_NAMES`.
      relabel: the file may have more or fewer labels; resize: latents of another size.

    Returns the float32 tree of `network`, and that of each head in the file, empty
    where it is not wanted.

    Raises UserError: the first tensor that is missing, foreign or of another shape, or
    another table of positions than the fixed one.
    """
    weights = _plain_names(weights)
    if relabel and LABELS in weights:
        network = network.clone(num_classes=len(weights[LABELS]) - 1)
    tables = {POSITIONS: weights.pop(POSITIONS, None)}
    if network.model.rope:
        tables |= {name: weights.pop(name, None) for name in ROTATIONS}
    found = {}
    for section, (prefix, linear) in names.items():
        own = {k: weights.pop(k) for k in list(weights) if k.startswith(f"{prefix}.")}
        if own and section in heads:
            keys = "head_layers, head_width, head_final_layer or width"
            foreign = f"the head of config.align.{section} is another (its {keys})"
            name = _head_name(prefix, linear)
            found[section] = tree.read(own, heads[section], name, foreign)
        elif own:
            found[section] = {}
    wanted = shapes(network, *network.inputs())
    params = tree.read(
        weights, wanted, _rule(network), FOREIGN, network.model.patch_size
    )
    for key, table in tables.items():
        if table is not None:
            _check_table(key, table, network, resize)
    return params, found


def _check_table(name: str, table: np.ndarray, network: DiT, resize: bool) -> None:
    """Raise UserError where a file's table is not the fixed one that is computed."""
    table = table.reshape(-1, table.shape[-1])
    grid = math.isqrt(len(table))
    if name == POSITIONS:
        fixed = sincos_positions(network.model.width, grid)
    else:
        of = rotations(network.model.width // network.model.heads, grid)
        fixed = of[ROTATIONS.index(name)]
    alike = table.shape == fixed.shape
    if not (alike and np.abs(table - fixed).max() <= POSITION_TOLERANCE):
        raise UserError(f"{name} is not the fixed table: unsupported")
    if grid != network.grid and not resize:
        size = grid * network.model.patch_size
        raise UserError(f"it needs --config.latents.size={size} (now {network.size})")


def to_reference(
    params: Params, heads: Mapping[str, Params], names: HeadNames, network: DiT
) -> dict[str, np.ndarray]:
    """The exact inverse of `from_reference`: float32 and contiguous, in SiT's names."""
    m, grid = network.model, network.grid
    weights = {POSITIONS: sincos_positions(m.width, grid)[None]}
    if m.rope:
        tables = rotations(m.width // m.heads, grid)
        weights |= dict(zip(ROTATIONS, tables, strict=True))
    weights |= tree.write(params, _rule(network), m.patch_size)
    for section, head in heads.items():
        own = tree.write(head, _head_name(*names[section]))
        if head.keys() == {"final"}:
            own = {k.replace(ALONE[1], ALONE[0]): v for k, v in own.items()}
        weights |= own
    return {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}


def reverse_time(params: Params, time_scale: float, velocity: bool) -> Params:
    """The network that at time t computes what `params` compute at 1 - t.

    SiT's own code runs from noise at 0 to data at 1, ours (REPA's, SRA's) from data to
    noise. The first time layer takes cos and sin of w t; those of w (1 - t) are linear
    in them, so its kernel is changed, exactly but for rounding to float32. A `velocity`
    changes its sign too.
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
        re.sub(r"(?<![^.])(module|_orig_mod)\.", "", k).replace(*ALONE): v
        for k, v in weights.items()
    }
    found = (re.match(r"blocks\.(\d+)\.", name) for name in plain)
    first = max((int(m[1]) + 1 for m in found if m), default=0)
    plain = {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v
        for k, v in plain.items()
    }
    if len(plain) < len(weights):
        raise UserError("holds the same tensor under several prefixes: save one")
    return plain


def _rule(network: DiT) -> Name:
    """Of the modules of a network in the file: SiT's names, or REPA's for MMDiT."""
    if not isinstance(network, MMDiT):
        return NAMES.__getitem__
    last = network.model.depth - 1

    def name(module: str) -> str:
        if module == "text":
            return "context_embedder"
        stack, _, layer = module.partition(".")
        if stack not in ("blocks", "last"):
            return NAMES[module]
        stream = TEXT if layer.startswith(TEXT) else ""
        theirs = NAMES[f"blocks.{layer.removeprefix(stream)}"].removeprefix("blocks.")
        number, _, rest = theirs.partition(".")
        number = str(last) if stack == "last" else number
        return f"joint_blocks.{number}.{STREAMS[stream]}.{rest}"

    return name


def _head_name(prefix: str, linear: str) -> Name:
    """Of a head's modules in the file."""

    def name(module: str) -> str:
        if module.startswith("linear_"):
            i = int(module.removeprefix("linear_"))
            module = linear.format(twice=2 * i, next=i + 1)
        return f"{prefix}.{FINAL.get(module, module)}"

    return name
