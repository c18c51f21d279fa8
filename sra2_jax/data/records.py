"""The schema of a latents dataset, for writer and reader: a folder with

* `latents-SPLIT.tfrecord-XXXXX-of-YYYYY`: tf.train.Example records of one image each:
  `mean`, `std` (raw float16 bytes, (h, w, c), posterior of the VAE, not scaled),
  `label`, `index` (position of the image in the source listing), and where asked for
  `image` (the crop, PNG), `features` (raw float16 bytes, (tokens, width)) and
  `captions` (raw uint16 bytes, (n + 1, tokens), the last one empty);
* `features.json` and `dataset_info.json`, for `tfds.builder_from_directory(folder)`;
* `latents.json`, the facts of `LatentsInfo`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sra2_jax import tfrecord
from sra2_jax.data.pixels import decode_rgb
from sra2_jax.errors import UserError, explained, one_line
from sra2_jax.storage import write_whole
from sra2_jax.tfrecord import Damaged, Shard

FORMAT = 1
MOMENTS = ("mean", "std")
FILE = "latents.json"
ENCODE = "python -m sra2_jax encode"


@dataclasses.dataclass(frozen=True)
class Shards:
    """The manifest of a split: one entry of each for every shard, in order.

    `records` and `bytes` are numbers and sizes, `sha256` is of the file (hexadecimal),
    empty in datasets made before it was kept.
    """

    records: tuple[int, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...] = ()

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[Any]]) -> Shards:
        """From JSON; earlier versions kept more."""
        names = [f.name for f in dataclasses.fields(cls) if f.name in lists]
        return cls(**{name: tuple(lists[name]) for name in names})


@dataclasses.dataclass(frozen=True)
class Features:
    """Stored patch features: (grid * grid, width) for an image, of `encoder`."""

    encoder: str
    grid: int
    width: int


@dataclasses.dataclass(frozen=True)
class Captions:
    """Stored captions: (count + 1, tokens) for an image, by `encoder`'s tokenizer."""

    encoder: str
    count: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class LatentsInfo:
    """What `latents.json` says about a dataset of latents.

    A training latent (h, w, c) is (mean + std * N(0, 1) - shift_factor) *
    scaling_factor, or where `channel_mean` and `channel_std` have a number for each
    channel, (mean + std * N(0, 1) - shift_factor - channel_mean) / channel_std *
    scaling_factor; `latent_mean` and `latent_std` are its statistics over the dataset,
    one number per channel. `class_names` is empty where the source has none. `images`,
    `features` and `captions` say what records hold besides. The mirrored image of
    record i is the record i + `mirror_offset`, 0 without. `options` are what it was
    made with.
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
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    captions: Captions | None = None

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a record holds as raw bytes, by name, see `raw`."""
        found: dict[str, tuple[int, ...]] = dict.fromkeys(MOMENTS, self.latent_shape)
        if self.features:
            found["features"] = (self.features.grid**2, self.features.width)
        if self.captions:
            found["captions"] = (self.captions.count + 1, self.captions.tokens)
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
        with explained(f"{path}: does not describe a latents dataset", make):
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            splits = {k: Shards.of(v) for k, v in fields.pop("splits").items()}
            for split in splits:
                check_split(split)
            kinds: dict[str, Any] = {"features": Features, "captions": Captions}
            for key, kind in kinds.items():
                fields[key] = kind(**fields[key]) if fields.get(key) else None
            for key, value in fields.items():
                fields[key] = tuple(value) if isinstance(value, list) else value
            return cls(splits=splits, **fields)

    def write(self, folder: str | os.PathLike) -> None:
        """Write `latents.json` into `folder`, all of it or nothing."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        write_whole(epath.Path(folder) / FILE, json.dumps(fields, indent=1) + "\n")


def raw(name: str) -> str:
    """The type of an array in the raw bytes of a record, two bytes a number."""
    return "<u2" if name == "captions" else "<f2"


def check_split(name: str) -> None:
    """Raises ValueError for a split whose files could lie in another folder."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"split {name!r} is no name of letters and digits")


def check_fields(
    info: LatentsInfo, folder: str | os.PathLike, fields: Sequence[str]
) -> None:
    """Refuse a dataset whose records lack one of `fields`: "image", "features",
    "captions".

    Raises UserError: the field, and the flag of the encoder that stores it.
    """
    for name, stored, flag in (
        ("image", info.images, "--store_images"),
        ("features", info.features, "--encoder=MODEL"),
        ("captions", info.captions, "--captions"),
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

    fields: "image", "features" and "captions", where the run reads them.

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
        ("latents.mean", "vae", latents.mean, info.channel_mean),
        ("latents.std", "vae", latents.std, info.channel_std),
    ]
    if info.captions:
        own = config.text.encoder
        rows.append(("text.encoder", "text_encoder", own, info.captions.encoder))
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


def read(
    rows: Sequence[tuple[Shard, int]], info: LatentsInfo, fields: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays of a batch of B records, each a shard and the number in it.

    fields: "image", "features", "captions" where wanted; else they are not touched.

    Returns `label` (B,) int32, `index` (B,) int64, `mean`, `std` (B, h, w, c) float16,
    `features` (B, tokens, width) float16, `image` (B, R, R, 3) uint8, `captions`
    (B, n + 1, tokens) uint16.

    Raises Damaged: a record that cannot be read, or is of another schema.
    """
    count, side = len(rows), info.resolution
    shapes = {k: v for k, v in info.arrays().items() if k in (*MOMENTS, *fields)}
    found = {name: np.empty((count, *v), raw(name)) for name, v in shapes.items()}
    found |= {"label": np.empty(count, np.int32), "index": np.empty(count, np.int64)}
    names = [*found, *({"image"} & set(fields))]
    if "image" in fields:
        found["image"] = np.empty((count, side, side, 3), np.uint8)
    for which, values in tfrecord.read(rows, names):
        for name in shapes:
            flat = found[name].reshape(count, -1).view(np.uint8)
            if values[name].shape[1] != flat.shape[1]:
                raise Damaged(rows[which[0]], f"has {name} not of {shapes[name]}")
            flat[which] = values[name]
        for name in ("label", "index"):
            found[name][which] = tfrecord.integers(values[name])
        for i, png in zip(which, values.get("image", ()), strict=False):
            try:
                found["image"][i] = decode_rgb(io.BytesIO(png.tobytes()))
            except Exception as error:  # broken files raise nearly anything
                reason = f"has a broken image ({one_line(error)})"
                raise Damaged(rows[i], reason) from None
    return found


def write_tfds_metadata(folder: str | os.PathLike, info: LatentsInfo) -> None:
    """Write `features.json` and `dataset_info.json`, as
    `tfds.folder_dataset.write_metadata` does, and the names of the classes."""
    core = "tensorflow_datasets.core.features."

    def shaped(shape: Sequence[int]) -> dict[str, Any]:
        return {"dimensions": [str(n) for n in shape]} if shape else {}

    def tensor(kind: str, shape: Sequence[int], dtype: str) -> dict[str, Any]:
        # Without "bytes" TFDS reads float16 as lists of float32.
        encoding = "bytes" if shape else "none"
        facts = {"dtype": dtype, "encoding": encoding, "shape": shaped(shape)}
        return {"pythonClassName": core + kind, "tensor": facts}

    features = {
        name: tensor("tensor_feature.Tensor", shape, np.dtype(raw(name)).name)
        for name, shape in info.arrays().items()
    }
    features["index"] = tensor("scalar.Scalar", (), "int64")
    features["label"] = {
        "classLabel": {"numClasses": str(info.num_classes)},
        "pythonClassName": core + "class_label_feature.ClassLabel",
    }
    if info.images:
        pixels = shaped((info.resolution, info.resolution, 3))
        features["image"] = {
            "image": {"dtype": "uint8", "encodingFormat": "png", "shape": pixels},
            "pythonClassName": core + "image_feature.Image",
        }
    splits = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": name,
            "numBytes": str(sum(shards.bytes)),
            "shardLengths": [str(n) for n in shards.records],
        }
        for name, shards in info.splits.items()
    ]
    files = {
        "features.json": {
            "featuresDict": {"features": features},
            "pythonClassName": core + "features_dict.FeaturesDict",
        },
        "dataset_info.json": {
            "description": f"Latents of {info.vae} at {info.resolution} pixels.",
            "fileFormat": "tfrecord",
            "name": "latents",
            "splits": splits,
            "version": "1.0.0",
        },
    }
    texts = {name: json.dumps(facts, indent=2) for name, facts in files.items()}
    if info.class_names:
        texts["label.labels.txt"] = "".join(f"{name}\n" for name in info.class_names)
    for name, text in texts.items():
        (epath.Path(folder) / name).write_text(text, encoding="utf-8")
