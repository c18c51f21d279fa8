"""Encode images once into a dataset of latents: python -m sra2_jax encode.

Images are decoded and cropped in threads while the devices run the encoder of the VAE
and this thread writes. The dataset appears under its name only when it is complete;
killed, the same command goes on with the shards that are left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.command import Parser
from sra2_jax.config import CAPTIONS
from sra2_jax.data import images as image_sources
from sra2_jax.data import records
from sra2_jax.data.build import WAITING, Build, ShardWriter
from sra2_jax.data.captions import captioned
from sra2_jax.data.check import run_check
from sra2_jax.data.options import Options, option
from sra2_jax.data.pixels import CROPS, to_png
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import patch_features
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.sharding import batch_sharding, make_mesh, replicated, rounded
from sra2_jax.weights import load_dinov2, load_vae, tokenizer

# What the records depend on; "listing" is of the images, "weights" of the networks.
MADE_WITH = (
    "images", "listing", "split", "vae", "weights", "resolution", "store_images",
    "encoder", "grid", "shards", "batch_size", "dtype", "mirror",
)  # fmt: skip
LATER = "captions", "text_encoder", "crop"  # and on these, if they are not the default
DTYPES = ("float32", "bfloat16")
Row = tuple[int, np.ndarray, int]  # index, uint8 (H, W, 3), label
Arrays = dict[str, np.ndarray]  # by name, (N, ...) float32


@dataclass(frozen=True)
class EncodeOptions(Options):
    """What a dataset of latents is encoded with."""

    images: str = option("", image_sources.SPECS)
    classes: str = option("", "file with a folder's classes, one a line; by name else")
    store_images: bool = option(
        False, "keep the cropped images too, as PNG, for methods that need them"
    )
    encoder: str = option(
        "", "store the patch features of this DINOv2: folder, hub id or built-in name"
    )
    grid: int = option(
        0, "features on a side; by default half the latent's, as for patches of 2"
    )
    batch_size: int = option(
        64, "images per call, over the local devices (rounded up to a multiple)"
    )
    max_bad: float = option(0.01, "share of unreadable images to leave out and list")
    dtype: str = option(DTYPES[0], "compute type of the networks", choices=DTYPES)
    mirror: bool = option(
        False, "also a record of each image mirrored: an epoch is twice as long"
    )
    crop: str = option(
        "adm", "ADM's, or of the largest square by LANCZOS, as COCO's", choices=CROPS
    )
    captions: str = option(
        "",
        "for classes: txt (NAME.txt beside NAME.jpg, in folders or .tar), a column of "
        ".parquet, or a file as COCO's captions_train2014.json",
    )
    text_encoder: str = option("", "whose tokenizer reads them: CLIP folder or hub id")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.grid < 0 or (self.grid and not self.encoder):
            raise UserError(
                f"--batch_size={self.batch_size} --grid={self.grid} "
                f"--encoder={self.encoder}: give a batch of at least one image, and a "
                "grid of at least one feature a side only with an encoder"
            )
        if bool(self.captions) != bool(self.text_encoder):
            raise UserError("--captions and --text_encoder: give both or none")
        inside = os.path.realpath(self.out).startswith(
            os.path.realpath(self.images) + "/"
        )
        if self.out and inside:
            raise UserError(f"--out={self.out}: would be a class of --images: move it")


def encode(
    options: EncodeOptions, progress: Callable[[int], None] = lambda count: None
) -> records.LatentsInfo | None:
    """Encode every image of a source into a new dataset of latents.

    Begins where an earlier call with the same options was interrupted. The result is
    the same, byte for byte, on the same kind of device.

    progress: called after each batch, with the number of its images.

    Returns the description of the dataset, None while other processes have shards to
    write.

    Raises UserError: no images, too many unreadable, something else in `out`, other
    options than the work began with, numbers not finite in float16.
    """
    images = options.images
    if options.captions:
        source = captioned(images, options.captions, options.split)
    else:
        source = image_sources.open_source(images, options.split, options.classes)
    if source.left_out:
        print(f"{images}: left out: {source.left_out}", file=sys.stderr)
    encoder = Encoder.load(options)
    options = _resolved(options, source.length, encoder)
    facts = {"listing": source.fingerprint, "weights": encoder.weights}
    made_with = {name: (vars(options) | facts)[name] for name in MADE_WITH}
    defaults = vars(EncodeOptions())
    changed = (name for name in LATER if getattr(options, name) != defaults[name])
    made_with |= {name: getattr(options, name) for name in changed}
    mirror_offset = options.mirror * source.length
    read = tokenizer(options.text_encoder) if options.captions else None

    stored = None
    if read is not None:
        length = read([""]).shape[1]
        stored = records.Captions(options.text_encoder, CAPTIONS, length)

    def captions(index: int) -> Arrays:
        """Tokens of the image's first captions, again where it has fewer, and of none;
        nothing where the images have labels."""
        if read is None:
            return {}
        texts = itertools.islice(itertools.cycle(source.captions(index)), CAPTIONS)
        return {"captions": read([*texts, ""])}

    def write(writer: ShardWriter, indices: Sequence[int]) -> Iterator[int]:
        rows = image_sources.readable(
            source,
            options.resolution,
            options.max_bad,
            writer.skip,
            indices=indices,
            mirror_offset=mirror_offset,
            crop=options.crop,
        )
        with ThreadPoolExecutor(16) as pool:
            png = to_png if options.store_images else lambda image: None
            size = options.batch_size
            for batch, arrays in encoded(rows, encoder, size, writer.shard):
                numbers, pixels, labels = zip(*batch, strict=True)
                stored = zip(labels, numbers, pool.map(png, pixels), strict=True)
                for i, row in enumerate(stored):
                    own: dict[str, Any] = {name: x[i] for name, x in arrays.items()}
                    own |= captions(row[1] % source.length)
                    writer.write(*row, **own)
                count = sum(number < source.length for number in numbers)
                progress(count)
                yield count

    return Build(options, encoder.vae.config, made_with).run(
        source.length,
        write,
        source.at_once,
        num_classes=source.num_classes,
        class_names=source.class_names,
        crop=CROPS[options.crop][1],
        images=options.store_images,
        features=encoder.features,
        captions=stored,
        mirror_offset=mirror_offset,
    )


def _resolved(options: EncodeOptions, length: int, encoder: Encoder) -> EncodeOptions:
    """The options with the numbers that follow from others."""
    features = encoder.features
    # A PNG as two bytes a pixel.
    size = 4 * math.prod(options.latent_shape(encoder.vae.config))
    size += 2 * options.store_images * options.resolution**2
    size += 2 * features.grid**2 * features.width if features else 0
    return dataclasses.replace(
        options.sharded(length, (1 + options.mirror) * size),
        grid=features.grid if features else 0,
        batch_size=rounded(options.batch_size, jax.local_device_count()),
    )


class Encoder:
    """uint8 images (N, H, W, 3), N a multiple of the local devices -> arrays (N, ...)
    on them: "mean" and "std" of a VAE's posterior and, with a DINOv2, "features".

    features: what the DINOv2 gives, None without; weights: SHA-256 of the parameters of
    each.
    """

    def __init__(self, vae: AutoencoderKL, params: Any) -> None:
        self.vae, self.weights = vae, ""
        self.features: records.Features | None = None
        self._mesh = make_mesh(devices=jax.local_devices())
        self._networks: list[tuple[Any, Any]] = []

        def moments(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            x = pixels.astype(jnp.float32) / 127.5 - 1
            mean, std = apply(vae, params, x, method="encode")
            return {"mean": mean, "std": std}

        self._add(moments, params)

    @classmethod
    def load(cls, options: EncodeOptions) -> Encoder:
        """The networks that the options name."""
        vae, params = load_vae(options.vae)
        side, _, _ = options.latent_shape(vae.config)
        encoder = cls(vae.clone(dtype=options.dtype), params)
        if options.encoder:
            found, params = load_dinov2(options.encoder)
            dinov2 = found.clone(dtype=jnp.dtype(options.dtype))
            width, grid = dinov2.config.hidden_size, options.grid or max(side // 2, 1)

            def features(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
                return {"features": patch_features(dinov2, params, pixels, grid)}

            encoder.features = records.Features(options.encoder, grid, width)
            encoder._add(features, params)
        return encoder

    def _add(self, network: Callable[..., Any], params: Any) -> None:
        self.weights = f"{self.weights} {_digest(params)}".strip()
        placed = jax.device_put(params, replicated(self._mesh))
        self._networks.append((jax.jit(network), placed))

    def __call__(self, images: np.ndarray) -> dict[str, jax.Array]:
        pixels = jax.device_put(images, batch_sharding(self._mesh))
        found: dict[str, jax.Array] = {}
        for network, params in self._networks:
            found |= network(params, pixels)
        return found


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def encoded(
    rows: Iterable[Row],
    encoder: Encoder,
    batch_size: int,
    shard: Callable[[int], int] = lambda index: 0,
) -> Iterator[tuple[list[Row], Arrays]]:
    """Encode rows, one batch while another is read: a batch, and its arrays (N, ...).

    batch_size: is rounded up to a multiple of the local devices; shard: of an index; a
    batch has images of one, in the order of the rows, so that it is the same whatever
    else is encoded.
    """
    size = rounded(batch_size, jax.local_device_count())

    def start(batch: list[Row]) -> tuple[list[Row], dict[str, jax.Array]]:
        images = [image for _, image, _ in batch]
        # One shape, one compilation: a last batch is filled up and cut again.
        return batch, encoder(np.stack(images + images[-1:] * (size - len(batch))))

    running = itertools.chain(map(start, _batched(rows, size, shard)), [([], {})])
    # A batch is waited for when the next one runs.
    for (batch, arrays), _ in itertools.pairwise(running):
        yield batch, {name: np.asarray(x)[: len(batch)] for name, x in arrays.items()}


def _batched(
    rows: Iterable[Row], size: int, shard: Callable[[int], int]
) -> Iterator[list[Row]]:
    waiting: dict[int, list[Row]] = {}
    for row in rows:
        key = shard(row[0])
        waiting.setdefault(key, []).append(row)
        if len(waiting[key]) == size:
            yield waiting.pop(key)
    for key in sorted(waiting):
        yield waiting[key]


def main() -> int | None:
    """Encode as the flags say and print what was done, or check a dataset."""
    parser = Parser(prog="sra2 encode", description=__doc__.partition("\n\n")[0])
    EncodeOptions.add_flags(parser)
    about = "read a dataset and name its damaged shards, instead of encoding"
    parser.add_argument("--check", metavar="DIR", help=about)
    start, flags = time.monotonic(), vars(parser.parse_args())
    if folder := flags.pop("check"):
        return run_check(folder)
    if missing := [f"--{n}" for n in ("images", "out", "vae") if not flags[n]]:
        parser.error(f"{' and '.join(missing)} must be given")
    info = encode(EncodeOptions(**flags))
    seconds = time.monotonic() - start
    if info is None:
        print(WAITING)
        return None
    size = sum(sum(shards.bytes) for shards in info.splits.values())
    rate = info.num_examples / seconds
    print(f"{info.num_examples:,} images, {rate:.1f} images/s, {size:,} bytes")
    return None
