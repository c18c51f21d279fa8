"""What the training of the two networks shipped with the project shares."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from sra2_jax.command import Parser
from sra2_jax.data.digits import load_digits

SEED = 0  # of the parameters; the next one of what the steps draw


def minimise(
    loss: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    learning_rate: float,
    steps: int,
) -> Any:
    """The parameters after `steps` updates; loss: of (parameters, a step's key);
    optimizer: of a learning rate, which warms up and falls to zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optimizer(rate))

    @jax.jit
    def update(
        params: Any, moments: optax.OptState, step: int
    ) -> tuple[Any, optax.OptState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(SEED + 1), step)
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, moments = transform.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments = transform.init(params)
    start = time.monotonic()
    for step in range(steps):
        params, moments, value = update(params, moments, step)
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {step:5d}  loss {value:.4f}  {seconds:.0f} s", flush=True)
    return params


def halved(params: Any) -> Any:
    """float16, as the weights are shipped."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)


def run(
    about: str,
    save: Callable[[np.ndarray, Path], None],
    measure: Callable[[Path], dict[str, str]],
    readme: str,
) -> None:
    """A program that trains on uint8 images (N, 32, 32, 3), saves, measures what it
    saved and writes a README, with places for {minutes} and {rows}, the figures."""
    parser = Parser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().out
    start = time.monotonic()
    pixels, _ = load_digits("train")
    save(pixels, folder)
    minutes = f"{(time.monotonic() - start) / 60:.1f}"
    figures = measure(folder)
    for name, value in figures.items():
        print(f"{name}: {value}")
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = readme.format(minutes=minutes, rows=rows)
    (folder / "README.md").write_text(text, encoding="utf-8")
