"""Networks and nothing else, Flax Linen, channels last."""

from functools import lru_cache
from typing import Any

import jax


def apply(module: Any, params: Any, *inputs: Any, **named: Any) -> Any:
    """module.apply on parameters alone; Flax's own type asks for variables back."""
    return module.apply({"params": params}, *inputs, **named)


def shapes(module: Any, *inputs: Any) -> Any:
    """ShapeDtypeStructs of a network's parameters; none is allocated."""
    return _shapes(module, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))


@lru_cache(maxsize=32)
def _shapes(module: Any, *inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
