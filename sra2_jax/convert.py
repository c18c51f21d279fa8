"""Import of reference (PyTorch layout) SiT weights into this project's tree."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sra2_jax.errors import UserError
from sra2_jax.models.dit import sincos_positions

# reference name of a linear layer -> path in our tree
OUTER = {
    "t_embedder.mlp.0": ("time_in",),
    "t_embedder.mlp.2": ("time_out",),
    "final_layer.adaLN_modulation.1": ("final", "modulation"),
}
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
      weights: reference parameter names -> arrays in PyTorch's layouts, conv kernels
        (out, in, h, w) and matrices (out, in).

    Returns:
      (settings, params): the DiT attributes the shapes determine (all but `heads`,
      which no shape shows) and the float32 parameter tree of `models.dit.DiT`. With
      learn_sigma the unused second half of the output is dropped.

    Raises:
      UserError: names are missing or left over, or the position table is not the
        fixed sine-cosine one.
    """
    rest = {k.removeprefix("module."): v for k, v in weights.items()}

    def take(name: str) -> np.ndarray:
        if name not in rest:
            raise UserError(f"not a SiT checkpoint: it has no {name!r}")
        return np.asarray(rest.pop(name), np.float32)

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": take(f"{name}.weight").T, "bias": take(f"{name}.bias")}

    patch = take("x_embedder.proj.weight")
    width, channels, p, _ = patch.shape
    positions, labels = take("pos_embed"), take("y_embedder.embedding_table.weight")
    grid = round(positions.shape[1] ** 0.5)
    if not np.allclose(positions[0], sincos_positions(width, grid), atol=1e-5):
        raise UserError("pos_embed is not the fixed sine-cosine table: unsupported")

    params: dict = {
        "patch": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(p * p * channels, width),
            "bias": take("x_embedder.proj.bias"),
        },
        "label": {"embedding": labels},
        "final": {"linear": _final_linear(linear("final_layer.linear"), p, channels)},
    }
    for name, path in OUTER.items():
        node = params
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = linear(name)
    depth = 1 + max(
        (int(m[1]) for k in rest if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1
    )
    blocks = [
        {ours: linear(f"blocks.{i}.{name}") for name, ours in BLOCK.items()}
        for i in range(depth)
    ]
    params["blocks"] = {
        name: {
            leaf: np.stack([block[name][leaf] for block in blocks])
            for leaf in ("kernel", "bias")
        }
        for name in BLOCK.values()
    }
    if rest:
        first = ", ".join(sorted(rest)[:3])
        raise UserError(f"{len(rest)} tensors do not belong to a SiT network: {first}")
    hidden = params["blocks"]["mlp_in"]["bias"].shape[-1]
    settings = {
        "size": grid * p,
        "channels": channels,
        "patch_size": p,
        "width": width,
        "depth": depth,
        "num_classes": len(labels) - 1,
        "mlp_ratio": hidden / width,
    }
    return settings, params


def _final_linear(layer: dict, p: int, channels: int) -> dict:
    """Keep the first `channels` of each pixel's output (all but learn_sigma's half)."""
    kernel = layer["kernel"].reshape(-1, p, p, layer["bias"].size // (p * p))
    bias = layer["bias"].reshape(p, p, -1)
    return {
        "kernel": kernel[..., :channels].reshape(len(kernel), -1),
        "bias": bias[..., :channels].reshape(-1),
    }
