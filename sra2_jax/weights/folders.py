"""Weights written as folders that diffusers and transformers open, and this package."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sra2_jax.models.dinov2 import DINOv2Config
from sra2_jax.models.vae import VAEConfig
from sra2_jax.weights import dinov2, files, tree, vae


def save_vae(folder: str | Path, config: VAEConfig, params: tree.Params) -> None:
    """Write an AutoencoderKL as diffusers 0.42 does, for `load_vae` and for diffusers.

    folder: made where missing; files of the same name are replaced. params: as
    `load_vae` returns them; each tensor is stored in its own dtype.
    """
    more = {
        "_diffusers_version": "0.42.1",
        "force_upcast": True,
        # Read by diffusers' tiled decoding only.
        "sample_size": 32 * config.downsample,
        "shift_factor": config.shift_factor or None,
        "latents_mean": list(config.latents_mean) or None,
        "latents_std": list(config.latents_std) or None,
    }
    _save(vae.FORMAT, Path(folder), config, params, more)


def save_dinov2(folder: str | Path, config: DINOv2Config, params: tree.Params) -> None:
    """Write an encoder as transformers 5 does, for `load_dinov2` and for transformers.

    folder: made where missing; files of the same name are replaced. params: as
    `load_dinov2` returns them; each tensor is stored in its own dtype.
    """
    depth = config.num_hidden_layers
    more = {
        "apply_layernorm": True,
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "dtype": str(np.asarray(params["norm"]["scale"]).dtype),
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layerscale_value": 1.0,
        "out_features": [f"stage{depth}"],
        "out_indices": [depth],
        "reshape_hidden_states": True,
        "stage_names": ["stem", *(f"stage{i + 1}" for i in range(depth))],
        "transformers_version": "5.23.0",
    }
    _save(dinov2.FORMAT, Path(folder), config, params, more)


def _save(
    form: files.Format,
    folder: Path,
    config: Any,
    params: tree.Params,
    more: dict[str, Any],
) -> None:
    """What `save_pretrained` of the library writes; more: for config.json."""
    tensors = tree.write(params, form.name, getattr(config, "patch_size", 1))
    folder.mkdir(parents=True, exist_ok=True)
    # A stale index would win over the new file, here and in the libraries.
    (folder / (form.weights + files.INDEX)).unlink(missing_ok=True)
    save_file(tensors, folder / form.weights, metadata={"format": "pt"})
    fields = dataclasses.asdict(config) | form.only(config) | more
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / files.CONFIG).write_text(text + "\n", encoding="utf-8")
