"""PyTorch's state dicts to trees of Flax and back, by one rule for every network.

A network gives the name that a module has in the file. A matrix is (out, in) there, a
convolution (out, in, h, w), the kernel that embeds patches such a convolution too, and
what is stacked here lies apart, a name with "{i}" for each block.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sra2_jax.errors import UserError

Params = dict[str, Any]
Shape = tuple[int, ...]
# "blocks.qkv" -> "blocks.{i}.attn.qkv"
Name = Callable[[str], str]

# What lies in modules, here and there; parameters without a module have a name alone.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _views(params: Params, name: Name, patch: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name in the file, and a view of its numbers as they lie there."""
    for path, leaf in traverse_util.flatten_dict(params).items():
        *modules, last = path
        if last in LEAVES:
            text = f"{name('.'.join(modules))}.{LEAVES[last]}"
        else:
            text = name(".".join(path))
        parts = np.asarray(leaf) if "{i}" in text else [np.asarray(leaf)]
        for i, part in enumerate(parts):
            if path[-2:] == ("patch", "kernel"):
                part = part.reshape(patch, patch, -1, part.shape[-1])
            if last == "kernel":
                part = part.transpose(3, 2, 0, 1) if part.ndim == 4 else part.T
            yield text.format(i=i), part


def write(params: Params, name: Name, patch: int = 1) -> dict[str, np.ndarray]:
    """The tensors of a file, contiguous, each in its own dtype."""
    return {k: np.ascontiguousarray(view) for k, view in _views(params, name, patch)}


def read(
    tensors: Mapping[str, np.ndarray],
    wanted: Any,
    name: Name,
    complaint: str,
    patch: int = 1,
) -> Params:
    """The exact inverse of `write`, float32; wanted: a tree of leaves with a shape.

    Raises UserError: as `check`.
    """
    # Checked before memory is taken for numbers that a config makes up.
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), wanted
    )
    check(tensors, {k: v.shape for k, v in _views(zeros, name, patch)}, complaint)
    params: Params = jax.tree.map(lambda zero: np.empty(zero.shape, zero.dtype), zeros)
    for key, view in _views(params, name, patch):
        view[...] = tensors[key]
    return params


def check(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Shape], complaint: str
) -> None:
    """Raise UserError, the complaint and the first tensor that is missing, foreign, of
    another shape, or does not hold real numbers."""
    found: dict[str, Any] = {
        key: x.shape if jnp.issubdtype(x.dtype, jnp.floating) else str(x.dtype)[:80]
        for key, x in tensors.items()
    }
    keys = sorted(found.keys() | wanted.keys())
    odd = [key for key in keys if found.get(key) != wanted.get(key)]
    if odd:
        raise UserError(
            f"{complaint}: {odd[0]} is {found.get(odd[0], 'missing')}, "
            f"{wanted.get(odd[0], 'no such tensor')} expected; {len(odd)} do not fit"
        )
