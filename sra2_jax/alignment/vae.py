"""SRA 2 (arXiv 2601.17830): the clean latent of the very sample that is denoised."""

from typing import Any

from jaxtyping import Array

from sra2_jax import config
from sra2_jax.alignment.base import Arrays, MLPAlignment
from sra2_jax.models.dit import DiT, patchify


class LatentAlignment(config.AlignVAE, MLPAlignment):
    """The scaled latent in the token layout of the network's output."""

    title = "SRA 2"
    aim = "the same latents"
    reference = "sra2_head"  # no name is published

    def features(self, network: DiT) -> int:
        return network.patch_size**2 * network.channels

    def draw(self, key: Array, clean: Arrays, transport: Any) -> dict[str, Array]:
        name = {"sample": "z", "mean": "mean"}[self.target]
        return {f"latent_{self.target}": clean[name]}

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        return patchify(draws[f"latent_{self.target}"], network.patch_size)
