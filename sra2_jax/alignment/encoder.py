"""REPA (arXiv 2410.06940): an encoder's patch features of the clean image."""

from functools import cached_property
from typing import Any

from jaxtyping import Array

from sra2_jax import config_align
from sra2_jax.alignment.base import Alignment, Arrays, MLPAlignment
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, patch_features
from sra2_jax.models.dit import DiT
from sra2_jax.weights import describe_dinov2, load_dinov2


class EncoderTarget(config_align.EncoderKeys, Alignment):
    """One feature of an encoder for each of the network's tokens."""

    @property
    def fields(self) -> tuple[str, ...]:
        return ("image",) if self.source == "images" else ("features",)

    @cached_property
    def frozen(self) -> DINOv2 | None:
        return describe_dinov2(self.model) if self.source == "images" else None

    def load(self) -> Any:
        encoder, params = load_dinov2(self.model)
        if encoder.config.hidden_size != self.width:
            raise UserError(
                f"{self.model} has tokens of width {encoder.config.hidden_size}: set "
                f"config.{self.where}.width to it"
            )
        return params

    def features(self, network: DiT) -> int:
        return self.width

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        if self.frozen is None:
            return draws["features"]
        encoder = self.frozen.clone(dtype=network.dtype)
        return patch_features(encoder, frozen, draws["image"], network.grid)

    def macs(self, network: DiT) -> int:
        return self.frozen.macs(network.grid) if self.frozen else 0


class EncoderAlignment(config_align.AlignEncoder, EncoderTarget, MLPAlignment):
    """REPA: the head is a perceptron, token by token."""

    title = "REPA"
    aim = "an encoder's features of the image"
    reference = "projectors.0"
