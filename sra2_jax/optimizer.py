"""AdamW or Muon behind a clip, and the learning rate's schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from sra2_jax.config import Optim

# Hidden matrices of a block -> how many lie side by side in each: queries, keys and
# values, and the halves of SwiGLU, are updated apart.
HIDDEN = {"qkv": 3, "attention_out": 1, "mlp_in": 1, "mlp_out": 1}
HIDDEN |= {"gated_in": 2, "gated_out": 1}
# RMS of Muon's updates, as AdamW's: one learning rate and weight decay serve both
# (Liu et al. 2025, arXiv 2502.16982).
MUON_RMS = 0.2


def schedule(o: Optim) -> optax.Schedule:
    """The learning rate of a step."""
    rate = optax.constant_schedule(o.learning_rate)
    if o.warmup_steps > 1:
        first = o.learning_rate / o.warmup_steps  # step 0 already moves
        rate = optax.linear_schedule(first, o.learning_rate, o.warmup_steps - 1)
    if o.decay == "none":
        return rate
    falls = {
        "linear": optax.linear_schedule(1.0, 0.0, o.decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, o.decay_steps),
    }
    fall = falls[o.decay]
    return lambda step: rate(step) * fall(jnp.maximum(step - o.decay_start, 0))


def optimizer(o: Optim) -> optax.GradientTransformation:
    """Of a tree {"network": DiT's, "heads": ...}, behind a global-norm clip.

    Muon moves the matrices of HIDDEN, each block's by itself, and AdamW all else.
    """
    rate, decay = schedule(o), o.weight_decay
    chosen = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=decay)
    if o.name == "muon":
        kinds = {"adamw": chosen, "muon": _muon(rate, o.eps, decay)}
        chosen = optax.partition(kinds, _kinds)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), chosen)


def _kinds(tree: Any) -> Any:
    def kind(path: tuple, x: Any) -> str:
        hidden = path[-2].key in HIDDEN and path[-1].key == "kernel"
        return "muon" if hidden else "adamw"

    return jax.tree_util.tree_map_with_path(kind, tree)


def _muon(
    rate: optax.Schedule, eps: float, decay: float
) -> optax.GradientTransformation:
    """The library's, of hidden matrices alone, shown as (depth, in, parts, out)."""

    def view(tree: Any) -> Any:
        def split(path: tuple, x: Any) -> Any:
            return x.reshape(*x.shape[:2], HIDDEN[path[-2].key], -1)

        return jax.tree_util.tree_map_with_path(split, tree)

    def dimensions(tree: Any) -> Any:
        return jax.tree.map(lambda x: MuonDimensionNumbers(1, 3), tree)

    inner = muon(
        rate,
        eps=eps,
        weight_decay=decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=MUON_RMS,
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(view(updates), state, view(params))
        flat = jax.tree.map(lambda x, old: x.reshape(old.shape), new, updates)
        return flat, state

    return optax.GradientTransformation(lambda params: inner.init(view(params)), update)
