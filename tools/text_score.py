"""How well images show what their prompts say: CLIP score, or PickScore.

python -m tools.text_score SAMPLES.npz --prompts=FILE --clip=FOLDER prints the mean over
images of the cosine with their prompts times the learned scale: CLIP score by CLIP's
weights (Hessel et al. 2021, of 100), PickScore by those of its own CLIP (Kirstain et
al. 2023). The network is transformers' `CLIPModel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from sra2_jax.command import Parser, run_program
from sra2_jax.errors import UserError
from sra2_jax.metrics.compare import watched
from sra2_jax.metrics.sets import ImageSet, open_images
from sra2_jax.models import apply, shapes
from sra2_jax.models.block import dense, layer_norm, stacked
from sra2_jax.models.clip import NORMAL, CLIPConfig, CLIPText, CLIPTextConfig
from sra2_jax.models.dinov2 import resize
from sra2_jax.models.dit import patchify
from sra2_jax.programs.sample import digest_of, read_prompts
from sra2_jax.sharding import make_mesh, replicated, rounded, spread
from sra2_jax.weights import tokenizer, tree
from sra2_jax.weights.clip import FORMAT, NAMES
from sra2_jax.weights.files import read_weights

# Means and standard deviations of red, green and blue in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Our modules -> theirs.
VISION = {k: v.replace("text_model", "vision_model") for k, v in NAMES.items()}
VISION |= {
    "patch": "vision_model.embeddings.patch_embedding",
    "class_token": "vision_model.embeddings.class_embedding",
    "first_norm": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}
BOTH = {f"text.{k}": v for k, v in NAMES.items()}
BOTH |= {f"vision.{k}": v for k, v in VISION.items()}
BOTH |= {name: name for name in ("text_projection", "logit_scale")}


@dataclass(frozen=True)
class CLIPVisionConfig(CLIPConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    projection_dim: int = 512
    image_size: int = 224
    patch_size: int = 32


class CLIPVision(nn.Module):
    """Image encoder: the class token of a vision transformer, projected."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """images: of equal squares, resized to the encoder's side."""
        cfg, b, d = self.config, len(images), self.config.hidden_size
        side = cfg.image_size
        pixels = resize(images.astype(jnp.float32) / 255, side, side, -0.5, True)
        pixels = (pixels.clip(0, 1) - jnp.array(MEAN)) / jnp.array(STD)
        x = dense(self, d, "patch", bias=False)(patchify(pixels, cfg.patch_size))
        token = self.param("class_token", NORMAL, (d,))
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x], axis=1)
        x = x + nn.Embed(x.shape[1], d, name="positions")(jnp.arange(x.shape[1]))
        x = layer_norm(cfg.layer_norm_eps, "first_norm")(x)
        blocks = cfg.block(self.dtype, causal=False)
        x = stacked(blocks, x, cfg.num_hidden_layers, scan=True)[:, 0]
        x = layer_norm(cfg.layer_norm_eps, "norm")(x)
        return dense(self, cfg.projection_dim, "projection", bias=False)(x)


class CLIP(nn.Module):
    """Both encoders: how well images show what texts say."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "b h w 3"], tokens: Int[Array, "b n"]
    ) -> Float[Array, " b"]:
        """The cosine of image and text times the learned scale, 100 in CLIP's own
        weights; a text's features are those of its end, the highest number."""
        seen = CLIPVision(self.vision, name="vision")(images)
        read = CLIPText(self.text, name="text")(tokens)
        read = jnp.take_along_axis(read, tokens.argmax(1)[:, None, None], 1)[:, 0]
        size = self.vision.projection_dim
        said = nn.Dense(size, use_bias=False, name="text_projection")(read)
        cosine = (seen * said).sum(-1)
        cosine /= jnp.linalg.norm(seen, axis=-1) * jnp.linalg.norm(said, axis=-1)
        return jnp.exp(self.param("logit_scale", nn.initializers.ones, ())) * cosine

    def shapes(self) -> Any:
        """ShapeDtypeStructs of its parameters; none is allocated."""
        images = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.uint8)
        return shapes(self, images, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def load(source: str) -> tuple[CLIP, tree.Params]:
    """CLIP, or PickScore's, of a folder or hub id.

    Raises UserError: as `load_clip`.
    """
    folder, text = FORMAT.describe(source)
    own: Any = {"network": CLIPVision, "config": CLIPVisionConfig}
    vision: Any = replace(FORMAT, part="vision_config", **own).describe(source)[1]
    module = CLIP(text.config, vision.config)
    tensors = read_weights(folder, FORMAT.weights)
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".position_ids")}
    how = BOTH.__getitem__, f"{folder}: weights of another network"
    return module, tree.read(tensors, module.shapes(), *how, vision.config.patch_size)


def text_score(
    weights: str, images: ImageSet, prompts: Sequence[str], mesh: Mesh, batch: int
) -> float:
    """The mean over images of the cosine with their prompts times the learned scale.

    images: i is of prompt i, and from the first on again, as `sra2 sample` makes them.

    Raises UserError: other prompts than those that the images were made of.
    """
    made_of = (images.settings or {}).get("prompts")
    if made_of not in (None, digest_of(prompts)):
        raise UserError(f"{images.name}: made of other prompts than --prompts")
    module, params = load(weights)
    numbers = np.arange(len(images)) % len(prompts)
    tokens = tokenizer(weights)(prompts).astype(np.int32)[numbers]
    params = jax.device_put(params, replicated(mesh))
    run = jax.jit(partial(apply, module), out_shardings=replicated(mesh))
    total, seen = 0.0, 0
    for part in watched(images.batches(batch), len(images), weights):
        rows = part, tokens[seen : seen + len(part)]
        scores = run(params, *(spread(x, batch, mesh) for x in rows))
        total += float(np.asarray(scores, np.float64)[: len(part)].sum())
        seen += len(part)
    return total / seen


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help=".npz of `sra2 sample`")
    add("--prompts", required=True, metavar="FILE", help="what they were made of")
    own = "folder or hub id of the CLIP that scores (%(default)s)"
    add("--clip", default="openai/clip-vit-large-patch14", metavar="WEIGHTS", help=own)
    a = parser.parse_args()
    images, prompts = open_images(a.samples), read_prompts(a.prompts)
    if not (len(images) and prompts):
        raise UserError(f"{a.samples}, {a.prompts}: no images, or no prompts")
    mesh = make_mesh()
    score = text_score(a.clip, images, prompts, mesh, rounded(64, mesh.size))
    print(f"{a.samples}: {score:.6g} by {a.clip}")


if __name__ == "__main__":
    run_program(main)
