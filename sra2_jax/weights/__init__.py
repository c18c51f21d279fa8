"""Published weights, read."""

from sra2_jax.weights.clip import describe_clip as describe_clip
from sra2_jax.weights.clip import load_clip as load_clip
from sra2_jax.weights.clip import spelled as spelled
from sra2_jax.weights.clip import tokenizer as tokenizer
from sra2_jax.weights.dinov2 import describe_dinov2 as describe_dinov2
from sra2_jax.weights.dinov2 import load_dinov2 as load_dinov2
from sra2_jax.weights.inception import load_inception as load_inception
from sra2_jax.weights.vae import describe_vae as describe_vae
from sra2_jax.weights.vae import load_vae as load_vae
from sra2_jax.weights.vae import read_statistics as read_statistics
