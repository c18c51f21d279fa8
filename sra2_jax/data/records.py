"""The schema of a latents dataset, for writer and reader: a folder with

* `latents-SPLIT.tfrecord-XXXXX-of-YYYYY`: tf.train.Example records of one image each:
  `mean`, `std` (raw float16 bytes, (h, w, c), posterior of the VAE, not scaled),
  `label`, `index` (position of the image in the source listing), and where asked for
  `image` (the crop, PNG) and `features` (raw float16 bytes, (tokens, width));
* `features.json` and `dataset_info.json`, for `tfds.builder_from_directory(folder)`;
* `latents.json`, the facts of `LatentsInfo`, readable without TensorFlow.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sra2_jax.errors import UserError, one_line
from sra2_jax.run import write_whole
from sra2_jax.runtime import tensorflow as tensorflow

FORMAT = 1
MOMENTS = ("mean", "std")
FILE = "latents.json"
ENCODE = "python -m sra2_jax encode"
CROP = "centre (ADM: BOX halvings, then BICUBIC)"


@dataclasses.dataclass(frozen=True)
class Shards:
    """The manifest of a split: one entry of each for every shard, in order.

    `records` and `bytes` are numbers and sizes, `sha256` is of the file (hexadecimal),
    `first` and `last` are the smallest and the largest `index`, -1 without records.
    The last three are empty in datasets made before they were kept.
    """

    records: tuple[int, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...] = ()
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        added = {len(self.sha256), len(self.first), len(self.last)}
        count = len(self.records)
        if not count or len(self.bytes) != count or added not in ({0}, {count}):
            raise ValueError("the lists of a split must have one entry per shard")


@dataclasses.dataclass(frozen=True)
class Features:
    """Stored patch features: (grid * grid, width) for an image, of `encoder`."""

    encoder: str
    grid: int
    width: int


@dataclasses.dataclass(frozen=True)
class LatentsInfo:
    """What `latents.json` says about a dataset of latents.

    A training latent (h, w, c) is (mean + std * N(0, 1) - shift_factor) *
    scaling_factor; `latent_mean` and `latent_std` are its statistics over the dataset,
    one number per channel. `class_names` is empty where the source has none. `images`
    and `features` say what records hold besides. The mirrored image of record i is the
    record i + `mirror_offset`, 0 without. `options` are what it was made with.
    """

    vae: str
    scaling_factor: float
    shift_factor: float
    resolution: int
    latent_shape: tuple[int, int, int]
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    splits: Mapping[str, Shards]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    crop: str
    versions: Mapping[str, str]
    images: bool = False
    features: Features | None = None
    mirror_offset: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.latent_shape) != 3:
            raise ValueError("latent_shape must be (h, w, c)")
        for split in self.splits:
            check_split(split)
        if self.num_examples != sum(sum(s.records) for s in self.splits.values()):
            raise ValueError("num_examples is not the number of records in the shards")

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a record holds as raw float16 bytes, by name."""
        found: dict[str, tuple[int, ...]] = dict.fromkeys(MOMENTS, self.latent_shape)
        if self.features:
            found["features"] = (self.features.grid**2, self.features.width)
        return found

    @classmethod
    def read(cls, folder: str | os.PathLike) -> LatentsInfo:
        """The description of the dataset in `folder` (local or gs://).

        Raises UserError: no `latents.json` there, or one that this version cannot read.
        """
        path = epath.Path(folder) / FILE
        make = f"make the dataset with `{ENCODE} --images=SOURCE --out={folder}`"
        if not path.exists():
            raise UserError(f"{folder}: no {FILE} in this folder; {make}")
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            splits = {k: Shards(**_tuples(v)) for k, v in fields.pop("splits").items()}
            stored = fields.pop("features", None)
            features = Features(**stored) if stored else None
            return cls(splits=splits, features=features, **_tuples(fields))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
            raise UserError(
                f"{path}: does not describe a latents dataset ({one_line(e)}); {make}"
            ) from None

    def write(self, folder: str | os.PathLike) -> None:
        """Write `latents.json` into `folder`, all of it or nothing."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        write_whole(epath.Path(folder) / FILE, json.dumps(fields, indent=1) + "\n")


def check_split(name: str) -> None:
    """Raises ValueError for a split whose files could lie in another folder."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"split {name!r} is no name of letters and digits")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples for lists, which JSON has instead."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def check_fields(
    info: LatentsInfo, folder: str | os.PathLike, fields: Sequence[str]
) -> None:
    """Refuse a dataset whose records lack one of `fields`: "image", "features".

    Raises UserError: the field, and the flag of the encoder that stores it.
    """
    for name, stored, flag in (
        ("image", info.images, "--store_images"),
        ("features", info.features, "--encoder=MODEL"),
    ):
        if name in fields and not stored:
            raise UserError(
                f"{folder}: its records hold no {name}; encode again with {flag} "
                f"({ENCODE})"
            )


def check(
    info: LatentsInfo,
    folder: str | os.PathLike,
    config: Any,
    fields: Sequence[str] = (),
) -> None:
    """Compare a dataset with the config of a run that reads it.

    fields: "image" and "features", where the run reads them.

    Raises UserError: one line with every contradiction, and the config key of each.
    """
    check_fields(info, folder, fields)
    data, latents = config.data, config.latents
    h, w, channels = info.latent_shape
    # The key, the flag of the encoder that could change the dataset, the two values.
    rows: list[tuple[str, str, Any, Any]] = [
        ("data.resolution", "resolution", data.resolution, info.resolution),
        ("latents.size", "", latents.size, h if h == w else (h, w)),
        ("latents.channels", "", latents.channels, channels),
        ("data.num_classes", "", data.num_classes, info.num_classes),
        ("latents.scaling_factor", "vae", latents.scaling_factor, info.scaling_factor),
        ("latents.shift_factor", "vae", latents.shift_factor, info.shift_factor),
    ]
    if stored := info.features:
        # The side of a patch; as text, 2 and not 2.0.
        patch, side = str(config.model.patch_size), f"{h / stored.grid:g}"
        for name, reader in config.feature_readers().items():
            rows += [
                (f"align.{name}.model", "encoder", reader.model, stored.encoder),
                (f"align.{name}.width", "encoder", reader.width, stored.width),
                ("model.patch_size", "grid", patch, side),
            ]
    problems = [
        f"config says {key}={wanted}, dataset was encoded with {found}: "
        f"change config.{key} or encode again" + (f" with --{flag}" if flag else "")
        for key, flag, wanted, found in rows
        if wanted != found
    ]
    if problems:
        raise UserError(f"{folder}: " + "; ".join(problems) + f" ({ENCODE})")


def shard_path(
    folder: str | os.PathLike, split: str, shard: int, shards: int
) -> epath.Path:
    """Path of a shard, named as TFDS expects it."""
    return epath.Path(folder) / f"latents-{split}.tfrecord-{shard:05d}-of-{shards:05d}"


def reason(error: Any) -> str:
    """What an error of TensorFlow says, without its operations and trace."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*", "", " ".join(error.message.split()))
    return f"{type(error).__name__}: {text.strip()[:120]}"


def serialize(
    label: int, index: int, image: bytes | None = None, **arrays: np.ndarray
) -> bytes:
    """One record: the label, the index in the source, float16 `arrays` (see
    `LatentsInfo.arrays`), and the PNG of the crop where it is stored."""
    train = tensorflow().train
    texts = {k: np.ascontiguousarray(x, "<f2").tobytes() for k, x in arrays.items()}
    if image is not None:
        texts["image"] = image
    feature = {
        name: train.Feature(bytes_list=train.BytesList(value=[text]))
        for name, text in texts.items()
    }
    for name, number in (("label", label), ("index", index)):
        feature[name] = train.Feature(int64_list=train.Int64List(value=[number]))
    example = train.Example(features=train.Features(feature=feature))
    # Else the fields come in an order that differs from process to process.
    return example.SerializeToString(deterministic=True)


def parse(
    serialized: Any, info: LatentsInfo, fields: Sequence[str] = ()
) -> dict[str, Any]:
    """Tensors of a whole batch of records: a third of the time of one by one.

    serialized: (B,) string tensor; fields: "image" and "features" where wanted.

    Returns `label` (B,) int32, `index` (B,) int64, `mean`, `std` (B, h, w, c) float16,
    `features` (B, tokens, width) float16, `image` (B, R, R, 3) uint8.
    """
    tf = tensorflow()
    text, integer = (tf.io.FixedLenFeature([], t) for t in (tf.string, tf.int64))
    schema = {"mean": text, "std": text, "label": integer, "index": integer}
    rows = tf.io.parse_example(serialized, schema | dict.fromkeys(fields, text))
    parsed = {"label": tf.cast(rows["label"], tf.int32), "index": rows["index"]}
    for name, shape in info.arrays().items():
        if name in rows:
            values = tf.io.decode_raw(rows[name], tf.float16)
            parsed[name] = tf.reshape(values, (-1, *shape))
    if "image" in rows:
        shape = (info.resolution, info.resolution, 3)
        parsed["image"] = tf.map_fn(
            lambda png: tf.ensure_shape(tf.io.decode_png(png, 3), shape),
            rows["image"],
            fn_output_signature=tf.uint8,
        )
    return parsed


def write_tfds_metadata(folder: str | os.PathLike, info: LatentsInfo) -> None:
    """Write `features.json` and `dataset_info.json` next to finished shards.

    TFDS reads the first example back, so a schema it cannot decode fails here.
    """
    tensorflow()
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        # Without encoding="bytes" TFDS stores float16 as float32 lists, twice as big.
        name: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
        for name, shape in info.arrays().items()
    }
    names = list(info.class_names) or None
    classes = None if names else info.num_classes
    features["label"] = tfds.features.ClassLabel(num_classes=classes, names=names)
    features["index"] = tfds.features.Scalar(dtype=np.int64)
    if info.images:
        shape = (info.resolution, info.resolution, 3)
        features["image"] = tfds.features.Image(shape=shape, encoding_format="png")
    splits = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=list(s.records), num_bytes=sum(s.bytes)
        )
        for name, s in info.splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=splits,
        description=f"Latents of {info.vae} at {info.resolution} pixels.",
    )
