"""Published weights of CLIP's text encoder, in the folder format of transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sra2_jax.errors import UserError, explained
from sra2_jax.models.clip import CLIPText, CLIPTextConfig
from sra2_jax.weights.files import Format, fetch

TOKENIZER = "tokenizer.json"

# Our modules -> theirs.
NAMES = {
    "tokens": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding",
    "norm": "text_model.final_layer_norm",
    "blocks.norm1": "text_model.encoder.layers.{i}.layer_norm1",
    "blocks.query": "text_model.encoder.layers.{i}.self_attn.q_proj",
    "blocks.key": "text_model.encoder.layers.{i}.self_attn.k_proj",
    "blocks.value": "text_model.encoder.layers.{i}.self_attn.v_proj",
    "blocks.attention_out": "text_model.encoder.layers.{i}.self_attn.out_proj",
    "blocks.norm2": "text_model.encoder.layers.{i}.layer_norm2",
    "blocks.mlp_in": "text_model.encoder.layers.{i}.mlp.fc1",
    "blocks.mlp_out": "text_model.encoder.layers.{i}.mlp.fc2",
}


def _text(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the text's half, without the table 0, 1, 2, ... of older files."""
    table = "text_model.embeddings.position_ids"
    own = {k: v for k, v in tensors.items() if k.startswith("text_model.")}
    return {k: v for k, v in own.items() if k != table}


FORMAT = Format(
    "model.safetensors",
    CLIPText,
    CLIPTextConfig,
    {},
    NAMES.__getitem__,
    _text,
    part="text_config",
)
load_clip = FORMAT.load
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
