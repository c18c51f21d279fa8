"""The dataset of a run, encoded first where it is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from sra2_jax.config import Config
from sra2_jax.config_file import no_latents
from sra2_jax.data import records
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.errors import UserError
from sra2_jax.runtime import Watch


@dataclass(frozen=True)
class Dataset:
    """A dataset of latents: its folder, its description, the SHA-256 of that."""

    folder: epath.Path
    info: records.LatentsInfo
    sha256: str

    def facts(self) -> dict[str, Any]:
        """What a run's run.json says of it."""
        return {
            "folder": str(self.folder),
            "sha256": self.sha256,
            "num_examples": self.info.num_examples,
            "scaling_factor": self.info.scaling_factor,
            "mean": self.info.latent_mean,
            "std": self.info.latent_std,
        }


def prepare(
    config: Config, folder: epath.Path, fields: Sequence[str], watch: Watch
) -> Dataset:
    """A run's dataset; encodes config.data.images into `folder` where it is missing.

    fields: what the run reads besides latents and labels, see `batches`; watch: is told
    of progress.

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
    digest = hashlib.sha256((folder / records.FILE).read_bytes()).hexdigest()
    return Dataset(folder, info, digest)
