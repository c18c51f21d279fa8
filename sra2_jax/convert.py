"""Import of reference (PyTorch layout) SiT weights into this project's tree."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sra2_jax.errors import UserError
from sra2_jax.models.dit import sincos_positions

Layer = dict[str, np.ndarray]

# reference name of a block's linear layer -> ours
BLOCK = {
    "attn.qkv": "qkv",
    "attn.proj": "attention_out",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
    "adaLN_modulation.1": "modulation",
}


def from_reference(
    weights: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a reference SiT state dict.

    Args:
      weights: reference names -> arrays, conv kernels (out, in, h, w) and matrices
        (out, in).

    Returns:
      (settings, params): the DiT attributes the shapes determine (all but `heads`,
      which no shape shows) and the float32 parameter tree of `models.dit.DiT`. With
      learn_sigma the unused second half of the output is dropped.

    Raises:
      UserError: missing or foreign names, another position table than the fixed one.
    """
    rest = {k.removeprefix("module."): v for k, v in weights.items()}

    def take(name: str) -> np.ndarray:
        if name not in rest:
            raise UserError(f"not a SiT checkpoint: it has no {name!r}")
        return np.asarray(rest.pop(name), np.float32)

    def linear(name: str) -> Layer:
        return {"kernel": take(f"{name}.weight").T, "bias": take(f"{name}.bias")}

    patch = take("x_embedder.proj.weight")
    width, channels, p, _ = patch.shape
    positions, labels = take("pos_embed"), take("y_embedder.embedding_table.weight")
    grid = round(positions.shape[1] ** 0.5)
    if not np.allclose(positions[0], sincos_positions(width, grid), atol=1e-5):
        raise UserError("pos_embed is not the fixed sine-cosine table: unsupported")

    params: dict[str, Any] = {
        "patch": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(p * p * channels, width),
            "bias": take("x_embedder.proj.bias"),
        },
        "label": {"embedding": labels},
        "time_in": linear("t_embedder.mlp.0"),
        "time_out": linear("t_embedder.mlp.2"),
        "blocks": _blocks(rest, linear),
        "final": {
            "modulation": linear("final_layer.adaLN_modulation.1"),
            "linear": _final_linear(linear("final_layer.linear"), p, channels),
        },
    }
    if rest:
        raise UserError(f"not names of a SiT network: {', '.join(sorted(rest)[:3])}")
    hidden = params["blocks"]["mlp_in"]["bias"]
    settings = {
        "size": grid * p,
        "channels": channels,
        "patch_size": p,
        "width": width,
        "depth": len(hidden),
        "num_classes": len(labels) - 1,
        "mlp_ratio": hidden.shape[-1] / width,
    }
    return settings, params


def _blocks(names: Iterable[str], linear: Callable[[str], Layer]) -> dict[str, Layer]:
    """The blocks' layers, each stacked over the blocks."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    depth = 1 + max((int(m[1]) for m in found if m), default=-1)
    if not depth:
        raise UserError("not a SiT checkpoint: it has no 'blocks.0'")
    stacked = {}
    for name, ours in BLOCK.items():
        layers = [linear(f"blocks.{i}.{name}") for i in range(depth)]
        stacked[ours] = {k: np.stack([layer[k] for layer in layers]) for k in layers[0]}
    return stacked


def _final_linear(layer: Layer, p: int, channels: int) -> Layer:
    """Keep the first `channels` of each pixel's output (all but learn_sigma's half)."""
    kernel = layer["kernel"].reshape(-1, p, p, layer["bias"].size // (p * p))
    bias = layer["bias"].reshape(p, p, -1)
    return {
        "kernel": kernel[..., :channels].reshape(len(kernel), -1),
        "bias": bias[..., :channels].reshape(-1),
    }
