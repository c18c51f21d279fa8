"""Import of reference (PyTorch layout) SiT, REPA and SRA weights."""

import re
from collections.abc import Mapping
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


# heads of REPA and SRA: their linear layers in order
HEADS = {
    "repa": ("projectors.0.0", "projectors.0.2", "projectors.0.4"),
    "sra": ("ap_head.linear1", "ap_head.linear2"),
}


def from_reference(
    weights: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Layer]]]:
    """Convert the state dict of a SiT, with or without REPA's or SRA's head.

    Args:
      weights: reference names -> arrays, conv kernels (out, in, h, w) and matrices
        (out, in).

    Returns:
      (settings, params, heads): the DiT attributes the shapes determine (all but
      `heads`, which no shape shows); the float32 tree of `models.dit.DiT`, without
      learn_sigma's unused half; name -> tree of `models.heads.MLPHead`.

    Raises:
      UserError: missing or foreign names, another position table than the fixed one.
    """
    file = _Weights(weights)
    take, linear = file.take, file.linear
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
        "blocks": _blocks(file),
        "final": {
            "modulation": linear("final_layer.adaLN_modulation.1"),
            "linear": _final_linear(linear("final_layer.linear"), p, channels),
        },
    }
    heads = {
        name: {f"linear_{i}": linear(layer) for i, layer in enumerate(layers)}
        for name, layers in HEADS.items()
        if f"{layers[0]}.weight" in file.rest
    }
    if file.rest:
        first = ", ".join(sorted(file.rest)[:3])
        raise UserError(f"not names of a SiT network: {first}")
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
    return settings, params, heads


class _Weights:
    """A state dict that tensors are taken out of; `rest` is what nobody asked for."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.rest = {k.removeprefix("module."): v for k, v in weights.items()}

    def take(self, name: str) -> np.ndarray:
        if name not in self.rest:
            raise UserError(f"not a SiT checkpoint: it has no {name!r}")
        return np.asarray(self.rest.pop(name), np.float32)

    def linear(self, name: str) -> Layer:
        kernel = self.take(f"{name}.weight").T
        return {"kernel": kernel, "bias": self.take(f"{name}.bias")}


def _blocks(file: _Weights) -> dict[str, Layer]:
    """The blocks' layers, each stacked over the blocks."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in file.rest)
    depth = 1 + max((int(m[1]) for m in found if m), default=-1)
    if not depth:
        raise UserError("not a SiT checkpoint: it has no 'blocks.0'")
    stacked = {}
    for name, ours in BLOCK.items():
        layers = [file.linear(f"blocks.{i}.{name}") for i in range(depth)]
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
