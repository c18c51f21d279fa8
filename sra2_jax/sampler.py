"""Euler, Heun and Euler-Maruyama samplers with guidance: classifier-free, and by the
prediction of an early block (Internal Guidance, arXiv 2512.24176).

Source: the samplers of SiT and REPA (`euler_sampler`, `euler_maruyama_sampler`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sra2_jax.transport import Transport

Velocity = Callable[[Array, Array, Array], Any]


@dataclass(frozen=True)
class Guidance:
    """weaker + scale (v - weaker) where low <= t <= high, scale 1 = off.

    Weaker is the velocity without a condition, or that of an early block. `channels`
    limits it to the first channels (SiT's and DiT's own published numbers guide 3 of
    4); 0 means all.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    channels: int = 0


def guided(
    velocity: Velocity,
    y: Array,
    null: Array | int,
    guidance: Guidance,
    head: Guidance = Guidance(),
) -> Callable[[Array, Array, Array], Array]:
    """(x, t, on) -> velocity, guided where the two of `on` say: by `guidance`, `head`.

    The head guides each call, with and without condition, before the two are mixed. The
    score is affine in the velocity: the drift of the SDE is guided alike.
    """

    def once(x: Array, t: Array, on: Array, y: Array = y) -> Array:
        found = velocity(x, jnp.full(x.shape[:1], t, x.dtype), y)
        if head.scale == 1.0:
            return found
        v, early = found
        return jnp.where(on[1], early + head.scale * (v - early), v)

    def both(x: Array, t: Array, on: Array) -> Array:
        # Pairs side by side, so that a sharded batch stays where it is.
        b = x.shape[0]
        x2 = jnp.repeat(x, 2, axis=0)
        nulls = jnp.broadcast_to(jnp.asarray(null, y.dtype), y.shape)
        y2 = jnp.stack([y, nulls], axis=1).reshape(2 * b, *y.shape[1:])
        v = once(x2, t, on, y2).reshape(b, 2, *x.shape[1:])
        cond, uncond = v[:, 0], v[:, 1]
        mixed = uncond + guidance.scale * (cond - uncond)
        n = guidance.channels
        return jnp.concatenate([mixed[..., :n], cond[..., n:]], -1) if n else mixed

    def evaluate(x: Array, t: Array, on: Array) -> Array:
        if guidance.scale == 1.0:
            return once(x, t, on)
        return jax.lax.cond(on[0], both, once, x, t, on)

    return evaluate


def time_grid(method: str, steps: int, transport: Transport) -> np.ndarray:
    """The steps + 1 times of a trajectory, descending, float64, shifted as those of
    training. The SDE ends with one noise-free step from 0.04, as the reference."""
    end, start = transport.sample_range
    if method == "euler_maruyama":
        times = np.append(linspace(start, 0.04, steps), end)
    else:
        times = linspace(start, end, steps + 1)
    return transport.shifted(times)


def linspace(start: float, end: float, count: int) -> np.ndarray:
    """As PyTorch's, counted from the nearer end: numpy's [1, 0] in tenths has
    0.29999999999999993, and guidance from 0.3 on would leave that step out."""
    step, i = (end - start) / (count - 1), np.arange(count)
    return np.where(i < count // 2, start + step * i, end - step * (count - 1 - i))


def sample(
    velocity: Velocity,
    x: Float[Array, "b h w c"],
    y: Array,
    *,
    null: Array | int,
    method: str,
    steps: int,
    transport: Transport,
    noise: Callable[[Array], Array],
    guidance: Guidance = Guidance(),
    head: Guidance = Guidance(),
) -> Float[Array, "b h w c"]:
    """Integrate from unit Gaussian noise x at t = 1 to a sample at t = 0, in x's dtype.

    Args:
      velocity: (x, t (B,), y (B, ...)) -> dx/dt, with `head` a pair of it and of an
        early block's; guidance doubles B.
      y: labels (B,), or features of texts (B, L, W); null: that of no condition.
      method: "euler" or "heun" (ODE), "euler_maruyama" (SDE with g^2 = 2t).
      noise: step number -> unit Gaussian noise shaped like x; only the SDE calls it.
    """
    times = time_grid(method, steps, transport)
    inside = [(g.low <= times) & (times <= g.high) for g in (guidance, head)]
    rows = (
        jnp.asarray(times[:-1], x.dtype),
        jnp.asarray(times[1:] - times[:-1], x.dtype),
        jnp.asarray(np.stack(inside, axis=1)[:-1]),
        jnp.arange(steps),
    )
    evaluate = guided(velocity, y, null, guidance, head)

    def drift(x: Array, t: Array, on: Array) -> Array:
        """The SDE's drift, v - g^2 score / 2 with g^2 = 2t."""
        v = evaluate(x, t, on)
        return v - t * transport.score(v, x, jnp.full(x.shape[:1], t, x.dtype))

    def euler(x: Array, row: tuple[Array, ...]) -> tuple[Array, None]:
        t, dt, on, _ = row
        return x + dt * evaluate(x, t, on), None

    def heun(x: Array, row: tuple[Array, ...]) -> tuple[Array, None]:
        t, dt, on, _ = row
        v = evaluate(x, t, on)
        # The second stage keeps the first one's decision on guidance.
        return x + dt * 0.5 * (v + evaluate(x + dt * v, t + dt, on)), None

    def euler_maruyama(x: Array, row: tuple[Array, ...]) -> tuple[Array, None]:
        t, dt, on, i = row
        spread = jnp.sqrt(2 * t * jnp.abs(dt))
        return x + dt * drift(x, t, on) + spread * noise(i), None

    step = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}[method]
    x, _ = jax.lax.scan(step, x, tuple(row[:-1] for row in rows))
    t, dt, on, _ = (row[-1] for row in rows)
    last = drift if method == "euler_maruyama" else evaluate  # Heun ends with Euler
    return x + dt * last(x, t, on)
