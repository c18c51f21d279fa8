"""Published DINOv2 weights, in the folder format of transformers."""

import numpy as np

from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.weights.files import Format

WEIGHTS = "model.safetensors"
# Keys that change the network and have one value we implement.
ONLY_VALUE = {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "num_channels": 3,
    "use_swiglu_ffn": False,
}
# Our modules -> theirs.
NAMES = {
    "patch": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "positions": "embeddings.position_embeddings",
    "norm": "layernorm",
    "blocks.norm1": "encoder.layer.{i}.norm1",
    "blocks.query": "encoder.layer.{i}.attention.attention.query",
    "blocks.key": "encoder.layer.{i}.attention.attention.key",
    "blocks.value": "encoder.layer.{i}.attention.attention.value",
    "blocks.attention_out": "encoder.layer.{i}.attention.output.dense",
    "blocks.scale1": "encoder.layer.{i}.layer_scale1.lambda1",
    "blocks.norm2": "encoder.layer.{i}.norm2",
    "blocks.mlp_in": "encoder.layer.{i}.mlp.fc1",
    "blocks.mlp_out": "encoder.layer.{i}.mlp.fc2",
    "blocks.scale2": "encoder.layer.{i}.layer_scale2.lambda1",
}
# An image classifier's file: the encoder's names with a prefix, and the classifier.
PREFIX, CLASSIFIER = "dinov2.", ("classifier.weight", "classifier.bias")


def _encoder(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of an image classifier without its prefix and its last layer."""
    kept = {k: v for k, v in tensors.items() if k not in CLASSIFIER}
    return {k.removeprefix(PREFIX): v for k, v in kept.items()}


name = NAMES.__getitem__
FORMAT = Format(WEIGHTS, DINOv2, DINOv2Config, ONLY_VALUE, name, _encoder)
load_dinov2 = FORMAT.load


def describe_dinov2(source: str) -> DINOv2:
    """The network of `load_dinov2` without its weights; of DINOv2-B without a file."""
    if source == "facebook/dinov2-base":
        return DINOv2(DINOv2Config())
    return FORMAT.describe(source)[1]
