"""How well images show what their prompts say."""

from collections.abc import Sequence
from functools import partial
from hashlib import sha256

import jax
import numpy as np
from jax.sharding import Mesh

from sra2_jax.errors import UserError
from sra2_jax.metrics.compare import watched
from sra2_jax.metrics.sets import ImageSet
from sra2_jax.models import apply
from sra2_jax.sharding import replicated, spread
from sra2_jax.weights import load_clip_score, tokenizer


def digest(prompts: Sequence[str]) -> str:
    """What tells lists of prompts apart, in the settings of samples."""
    return sha256("\n".join(prompts).encode()).hexdigest()


def text_score(
    weights: str, images: ImageSet, prompts: Sequence[str], mesh: Mesh, batch: int
) -> float:
    """The mean over images of the cosine with their prompts times the learned scale:
    CLIP score by CLIP's weights (Hessel et al. 2021, of 100), PickScore by its own
    (Kirstain et al. 2023).

    images: i is of prompt i, and from the first on again, as `sra2 sample` makes them.

    Raises UserError: other prompts than those that the images were made of.
    """
    made_of = (images.settings or {}).get("prompts")
    if made_of not in (None, digest(prompts)):
        raise UserError(f"{images.name}: made of other prompts than --prompts")
    module, params = load_clip_score(weights)
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
