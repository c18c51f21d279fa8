"""Which implementation of attention a device runs, tried before it is relied on."""

import functools
import warnings
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sra2_jax.errors import one_line

Implementation = Literal["xla", "cudnn"]
TOLERANCE = 0.05  # of the largest gradient, bf16


@functools.cache
def implementation(
    wanted: str, dtype: str, tokens: int, heads: int, head_size: int
) -> Implementation:
    """ "xla" or "cudnn".

    "auto" is cuDNN's flash attention on a GPU in bfloat16, which spares the traffic of
    the score matrices, and XLA's elsewhere. cuDNN runs once, forward and backward, on a
    small batch of these sizes; where it fails or computes something else than XLA, a
    warning says so and XLA's is used.
    """
    automatic = wanted == "auto" and jax.default_backend() != "gpu"
    if wanted == "xla" or dtype != "bfloat16" or automatic:
        return "xla"

    def gradients(name: Implementation) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> Array:
            out = jax.nn.dot_product_attention(q, k, v, implementation=name)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        keys = jax.random.split(jax.random.key(0), 3)
        shape = (2, tokens, heads, head_size)
        arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
        return [x.astype(jnp.float32) for x in found]

    try:
        with jax.ensure_compile_time_eval():  # it is asked while a step is traced
            pairs = zip(gradients("cudnn"), gradients("xla"), strict=True)
            errors = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in pairs]
            error = float(jnp.max(jnp.array(errors)))
        if error < TOLERANCE:
            return "cudnn"
        reason = f"its gradients are {error:.2g} off"
    except Exception as failure:  # of any layer: cuDNN, XLA, JAX
        reason = one_line(failure)
    warnings.warn(
        f"cuDNN's attention does not work here ({reason}): XLA's is used, which is "
        "slower; --config.model.attention=xla says so from the start",
        stacklevel=2,
    )
    return "xla"
