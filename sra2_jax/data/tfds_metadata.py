"""What `tfds.builder_from_directory` needs to open a dataset of latents."""

import os
from typing import Any

import numpy as np

from sra2_jax.data.records import LatentsInfo, tensorflow


def write_tfds_metadata(folder: str | os.PathLike, info: LatentsInfo) -> None:
    """Write `features.json` and `dataset_info.json` next to finished shards.

    TFDS reads the first example back, so a schema it cannot decode fails here.
    """
    tensorflow()
    import tensorflow_datasets as tfds

    def halves(shape: tuple[int, ...]) -> Any:
        # Without encoding="bytes" TFDS stores float16 as float32 lists, twice as big.
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")

    if info.class_names:
        label = tfds.features.ClassLabel(names=list(info.class_names))
    else:
        label = tfds.features.ClassLabel(num_classes=info.num_classes)
    features = {
        "mean": halves(info.latent_shape),
        "std": halves(info.latent_shape),
        "label": label,
        "index": tfds.features.Scalar(dtype=np.int64),
    }
    if info.images:
        features["image"] = tfds.features.Image(
            shape=(info.resolution, info.resolution, 3), encoding_format="png"
        )
    if stored := info.features:
        features["features"] = halves((stored.grid**2, stored.width))
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=list(shards.records),
                num_bytes=sum(shards.bytes),
            )
            for name, shards in info.splits.items()
        ],
        description=f"Latents of {info.vae} at {info.resolution} pixels.",
    )
