"""SRA 2 in JAX/Flax: diffusion transformers aligned with their own VAE latents."""

__version__ = "0.1.0"
