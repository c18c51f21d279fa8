"""Published weights, read."""

from sra2_jax.weights.clip import (
    describe_clip,
    load_clip,
    spelled,
    tokenizer,
)
from sra2_jax.weights.dinov2 import describe_dinov2, load_dinov2
from sra2_jax.weights.inception import load_inception
from sra2_jax.weights.vae import describe_vae, load_vae, read_statistics

__all__ = [
    "describe_clip",
    "describe_dinov2",
    "describe_vae",
    "load_clip",
    "load_dinov2",
    "load_inception",
    "load_vae",
    "read_statistics",
    "spelled",
    "tokenizer",
]
