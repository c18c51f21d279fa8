"""SRA 2 (arXiv 2601.17830): the clean latent of the very sample that is denoised."""

from dataclasses import replace
from typing import Any

from jaxtyping import Array

from sra2_jax import config_align
from sra2_jax.alignment.base import Arrays, MLPAlignment
from sra2_jax.models.dit import DiT, patchify, unpatchify


class LatentAlignment(config_align.AlignVAE, MLPAlignment):
    """The scaled latent, or the velocity, in the token layout of the network's output.

    With the velocity, the loss "l2" and a head that is a final layer alone this is
    Internal Guidance (arXiv 2512.24176).
    """

    reference = "sra2_head"  # no name is published

    @property
    def title(self) -> str:
        return "Internal Guidance" if self.target == "velocity" else "SRA 2"

    @property
    def aim(self) -> str:
        return "the velocity" if self.target == "velocity" else "the same latents"

    def features(self, network: DiT) -> int:
        return network.model.patch_size**2 * network.channels

    def draw(self, key: Array, clean: Arrays, transport: Any) -> dict[str, Array]:
        if self.target == "velocity":
            transport = replace(transport, prediction="velocity")
            _, found = transport.interpolate(clean["z"], clean["noise"], clean["t"])
        else:
            found = clean[{"sample": "z", "mean": "mean"}[self.target]]
        return {f"latent_{self.target}": found}

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        return patchify(draws[f"latent_{self.target}"], network.model.patch_size)

    def velocity(
        self, tokens: Array, x_t: Array, t: Array, network: DiT, transport: Any
    ) -> Array:
        """dx_t/dt, shaped like x_t (B, h, w, c), that the head's tokens mean."""
        predicted = unpatchify(tokens, network.model.patch_size)
        if self.target == "velocity":
            return predicted
        return transport.towards(predicted, x_t, t)
