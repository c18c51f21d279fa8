"""Published weights of CLIP, in the folder format of transformers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sra2_jax.errors import UserError, explained
from sra2_jax.models.clip import (
    CLIP,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from sra2_jax.weights import tree
from sra2_jax.weights.files import Format, fetch, read_weights

TOKENIZER = "tokenizer.json"

# Our modules -> theirs, of a block, of the text's half, of the image's, and of both.
BLOCK = {
    "norm1": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
TEXT = {f"blocks.{k}": f"text_model.encoder.layers.{{i}}.{v}" for k, v in BLOCK.items()}
TEXT |= {
    "tokens": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding",
    "norm": "text_model.final_layer_norm",
}
VISION = {k: v.replace("text_model", "vision_model") for k, v in TEXT.items()}
VISION |= {
    "patch": "vision_model.embeddings.patch_embedding",
    "class_token": "vision_model.embeddings.class_embedding",
    "first_norm": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}
BOTH = {f"text.{k}": v for k, v in TEXT.items()}
BOTH |= {f"vision.{k}": v for k, v in VISION.items()}
BOTH |= {name: name for name in ("text_projection", "logit_scale")}


def _tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the tables 0, 1, 2, ... of older files."""
    return {k: v for k, v in tensors.items() if not k.endswith(".position_ids")}


def _text(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    own = _tensors(tensors)
    return {k: v for k, v in own.items() if k.startswith("text_model.")}


FORMAT = Format(
    "model.safetensors",
    CLIPText,
    CLIPTextConfig,
    {},
    TEXT.__getitem__,
    _text,
    part="text_config",
)
load_clip = FORMAT.load


def load_clip_score(source: str) -> tuple[CLIP, tree.Params]:
    """Both halves: of CLIP, or of PickScore, a CLIP of its own. Raises UserError: as
    `load_clip`."""
    folder, text = FORMAT.describe(source)
    own: Any = {"network": CLIPVision, "config": CLIPVisionConfig}
    other = replace(FORMAT, part="vision_config", **own)
    vision: Any = other.describe(source)[1]
    module = CLIP(text.config, vision.config)
    tensors = _tensors(read_weights(folder, FORMAT.weights))
    how = BOTH.__getitem__, f"{folder}: weights of another network"
    wanted, patch = module.shapes(), vision.config.patch_size
    return module, tree.read(tensors, wanted, *how, patch)


LARGE = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12
)  # of openai/clip-vit-large-patch14


def describe_clip(source: str) -> CLIPText:
    """The network of `load_clip` without its weights; of ViT-L/14 without a file."""
    if source == "openai/clip-vit-large-patch14":
        return CLIPText(LARGE)
    return FORMAT.describe(source)[1]


def spelled(source: str, tokens: np.ndarray) -> list[str]:
    """The texts of tokens (N, L). Raises UserError: as `tokenizer`."""
    found = _tokenizer(source)
    ends = set(found.encode("").ids)
    rows = [[n for n in row if n not in ends] for row in tokens.tolist()]
    texts: list[str] = found.decode_batch(rows)
    return texts


def _tokenizer(source: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise UserError("captions need it: pip install -e '.[text]'") from None
    path = fetch(source, FORMAT.weights, TOKENIZER) / TOKENIZER
    with explained(f"{path}: no tokenizer", "fetch it again, or choose another"):
        return Tokenizer.from_file(str(path))


def tokenizer(source: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> uint16 (N, L), the numbers of their tokens, cut off at the encoder's
    length or filled up with their end, as ViT-L/14 has it. source: as of `load_clip`,
    with tokenizer.json.

    Raises UserError: there is none, or no package that reads it.
    """
    found = _tokenizer(source)
    length = describe_clip(source).config.max_position_embeddings
    found.enable_truncation(length)

    def numbers(texts: Sequence[str]) -> np.ndarray:
        rows = np.empty((len(texts), length), np.uint16)
        for row, text in zip(rows, found.encode_batch(list(texts)), strict=True):
            row[:] = text.ids[-1]
            row[: len(text.ids)] = text.ids
        return rows

    return numbers
