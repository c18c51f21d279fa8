"""The dataset of a run, encoded first where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from sra2_jax.config import Config
from sra2_jax.config_file import no_latents
from sra2_jax.data import records
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.errors import UserError
from sra2_jax.runtime import Watch
from sra2_jax.storage import sha256


def with_statistics(config: Config, folder: epath.Path) -> Config:
    """The config with the statistics by channel of a dataset that has them, where its
    own are not given."""
    if config.latents.mean or not (folder / records.FILE).exists():
        return config
    info = records.LatentsInfo.read(folder)
    if len(info.channel_mean) != config.latents.channels:
        return config
    found = {"latents.mean": info.channel_mean, "latents.std": info.channel_std}
    return config.override(found)


def prepare(
    config: Config, folder: epath.Path, fields: Sequence[str], watch: Watch
) -> dict[str, Any]:
    """See that a run's dataset is in `folder`: encodes config.data.images where it is
    missing.

    fields: what the run reads besides latents and labels, see `batches`; watch: is told
    of progress.

    Returns what the run's run.json says of it.

    Raises UserError: no dataset and no images, or one that contradicts the config.
    """
    if not (folder / records.FILE).exists():
        if not config.data.images:
            raise no_latents(folder)
        if jax.process_count() > 1:
            raise UserError(
                f"no latents dataset in {folder}: encode it on one machine first "
                f"({records.ENCODE})"
            )
        encoders = [s.model for s in config.feature_readers().values()]
        options = EncodeOptions(
            out=str(folder),
            vae=config.vae,
            resolution=config.data.resolution,
            images=config.data.images,
            store_images="image" in fields,
            encoder=encoders[0] if encoders else "",
            grid=config.grid if encoders else 0,
        )
        encode(options, lambda count: watch.progress("start"))
    info = records.LatentsInfo.read(folder)
    records.check(info, folder, config, fields)
    return {
        "folder": str(folder),
        "sha256": sha256(folder / records.FILE),
        "num_examples": info.num_examples,
        "scaling_factor": info.scaling_factor,
        "mean": info.latent_mean,
        "std": info.latent_std,
    }
