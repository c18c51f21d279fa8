"""The dataset of a run, encoded first where it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from sra2_jax.config import no_latents
from sra2_jax.data import records
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.errors import UserError


def prepare(
    config: Any,
    workdir: epath.Path,
    fields: Sequence[str],
    progress: Callable[[int, int], None],
) -> tuple[epath.Path, records.LatentsInfo]:
    """The folder and the description of a run's dataset; encodes config.data.images
    first where it is missing.

    Args:
      fields: what the run reads besides latents and labels, see `batches`.
      progress: called while it is encoded, see `encode`.

    Raises:
      UserError: no dataset and no images, or a dataset that contradicts the config.
    """
    folder = epath.Path(config.data.dir or workdir / "latents")
    if not (folder / records.FILE).exists():
        if not config.data.images:
            raise no_latents(folder)
        if jax.process_count() > 1:
            raise UserError(
                f"no latents dataset in {folder}: encode it on one machine first "
                f"({records.ENCODE})"
            )
        stored = "features" in fields
        options = EncodeOptions(
            out=str(folder),
            vae=config.vae,
            resolution=config.data.resolution,
            images=config.data.images,
            store_images="image" in fields,
            encoder=config.align.encoder.model if stored else "",
            grid=config.latents.size // config.model.patch_size if stored else 0,
        )
        encode(options, progress)
    info = records.LatentsInfo.read(folder)
    records.check(info, folder, config, fields)
    return folder, info
