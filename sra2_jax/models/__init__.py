"""Networks and nothing else, Flax Linen, channels last."""

from typing import Any


def apply(module: Any, params: Any, *inputs: Any, **named: Any) -> Any:
    """module.apply on parameters alone; Flax's own type asks for variables back."""
    return module.apply({"params": params}, *inputs, **named)
