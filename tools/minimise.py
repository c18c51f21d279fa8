"""Minimise a loss from where an earlier call was cut off; for small networks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import optax
from etils import epath

from sra2_jax.errors import explained
from sra2_jax.storage import whole_file

SEED = 0  # of the parameters; the next one of what the steps draw


def minimise(
    loss: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    learning_rate: float,
    steps: int,
    kept: Path | None = None,
) -> Any:
    """The parameters after `steps` updates.

    loss: of (parameters, a step's key); optimizer: of a learning rate, which warms up
    and falls to zero; kept: file of the state, written now and then and gone on from.

    Raises UserError: `kept` is of something else.
    """
    warmup = min(100, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optimizer(rate))

    @jax.jit
    def update(
        params: Any, moments: optax.OptState, step: int
    ) -> tuple[Any, optax.OptState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(SEED + 1), step)
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, moments = transform.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    state, first = (params, transform.init(params)), 0
    if kept and kept.exists():
        with explained(f"{kept}: cannot be gone on from", "remove it"):
            first, *state = flax.serialization.from_bytes(
                (0, *state), kept.read_bytes()
            )
    start = written = time.monotonic()
    for step in range(first, steps):
        *state, value = update(*state, step)
        now = time.monotonic()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {value:.4f}  {now - start:.0f} s", flush=True)
        if kept and (now - written > 60 or step == steps - 1):
            with whole_file(epath.Path(kept)) as file:
                file.write(flax.serialization.to_bytes((step + 1, *state)))
            written = now
    return state[0]


def halved(params: Any) -> Any:
    """float16, as the weights are shipped."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
