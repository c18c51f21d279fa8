"""Sample images from a run: python -m sra2_jax sample RUN --out=samples.npz.

Writes a grid as .png, or ADM's format: arr_0, uint8 (N, H, W, 3); beside it arr_1, the
labels, and settings, a JSON text with everything that made them. A program that was
killed goes on when run again: finished parts stay in samples.shards/ until the file is
whole.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sra2_jax import generator, runtime
from sra2_jax.command import Parser, add_distributed
from sra2_jax.data.pixels import to_png
from sra2_jax.errors import UserError
from sra2_jax.metrics.compare import watched
from sra2_jax.metrics.sets import write_npz
from sra2_jax.storage import new_file, read_json, whole_file, write_json

NPZ, PICTURE = ".npz", ".png"
COLUMNS = 8  # of a grid; or one for each of a few prompts
FILE = "settings.json"
IMAGES = 1024  # of a part, about


class Parts:
    """Images 0 ... count - 1, uint8 (H, W, 3), in files of `size` consecutive ones."""

    def __init__(self, folder: epath.Path, count: int, size: int) -> None:
        self.folder = folder
        self.indices = np.split(np.arange(count), np.arange(size, count, size))

    def path(self, number: int) -> epath.Path:
        return self.folder / f"{number:06d}.npy"

    def missing(self) -> list[int]:
        """Their numbers, as process 0 sees it: others may not see a new file yet."""
        numbers = range(len(self.indices))
        missing = np.array([not self.path(n).exists() for n in numbers])
        if jax.process_count() > 1:
            missing = multihost_utils.broadcast_one_to_all(missing)
        return np.flatnonzero(missing).tolist()

    def write(self, number: int, images: np.ndarray) -> None:
        with whole_file(self.path(number)) as file:
            np.save(file, images)

    def read(self) -> Iterator[np.ndarray]:
        """All in order. Raises UserError: a damaged one, which is removed."""
        for path in map(self.path, range(len(self.indices))):
            try:
                with path.open("rb") as file:
                    yield np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                path.unlink(missing_ok=True)
                again = "was damaged and is removed: run the same command again"
                raise UserError(f"{path}: {again}") from error


def fill(parts: Parts, generate: generator.Generator, labels: np.ndarray) -> None:
    """Make the parts that are missing, with all processes; each writes its share.

    labels: of all images."""
    if not (missing := parts.missing()):
        return
    indices = np.concatenate([parts.indices[n] for n in missing])
    batches = generate(indices, labels[indices])
    images = itertools.chain.from_iterable(watched(batches, len(indices), "sample"))
    for number in missing:
        part = np.stack([*itertools.islice(images, len(parts.indices[number]))])
        if number % jax.process_count() == jax.process_index():
            parts.write(number, part)


def sample(
    generate: generator.Generator,
    out: epath.Path,
    count: int,
    prompts: Sequence[str] = (),
) -> None:
    """Write `count` samples to `out`, from where an earlier call was cut off.

    prompts: of a program with captions; image i is of prompt i, and from the first on
    again, and arr_1 has their numbers.

    Raises UserError: parts of other samples are in the way.
    """
    began = time.perf_counter()
    # Whole batches: whoever goes on later makes the same ones.
    size = generate.batch * max(1, IMAGES // generate.batch)
    settings = generate.settings | {"count": count, "shard": size}
    indices = np.arange(count)
    if generate.program.reader:
        labels = indices % len(prompts)
        tokens = generator.prompted(generate.config, prompts)[labels]
        settings["prompts"] = digest_of(prompts)
    else:
        tokens = labels = generator.draw_labels(generate.config, indices)
    parts = Parts(out.with_suffix(".shards"), count, size)
    first, beside = jax.process_index() == 0, parts.folder / FILE
    if beside.exists():
        generator.refuse_others(parts.folder, read_json(beside), settings)
    elif first:
        parts.folder.mkdir(parents=True, exist_ok=True)
        write_json(beside, settings)
    multihost_utils.sync_global_devices("settings of the samples")
    fill(parts, generate, tokens)
    multihost_utils.sync_global_devices("samples")
    if not first:
        return
    if out.suffix == PICTURE:
        columns = len(prompts) if 1 < len(prompts) <= 2 * COLUMNS else COLUMNS
        images = np.concatenate([*parts.read()])
        with whole_file(out) as file:
            file.write(to_png(generator.grid(images, min(columns, count))))
    else:
        arrays = {"arr_1": labels, "settings": np.array(json.dumps(settings))}
        side = generate.config.data.resolution
        write_npz(out, arrays, parts.read(), (count, side, side, 3))
    parts.folder.rmtree()
    print(f"{out}: {count:,} images in {time.perf_counter() - began:.0f} s")


def digest_of(prompts: Sequence[str]) -> str:
    """What tells lists of prompts apart, in the settings of samples."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def read_prompts(source: str | None) -> list[str]:
    """The lines of a file, or `source` itself where there is none of that name."""
    if not source or not epath.Path(source).exists():
        return [source] if source else []
    lines = epath.Path(source).read_text().splitlines()
    return [line.strip() for line in lines if line.strip()]


def add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("workdir", metavar="RUN", help="folder of a run")
    add("--step", type=int, help="of the checkpoint (the newest)")
    weights = "ema, raw, or one of config.ema_others (%(default)s)"
    add("--weights", default="ema", help=weights)


def add_run_arguments(parser: Parser) -> None:
    """The flags that name a run and its weights."""
    add_weights(parser)
    add_distributed(parser)
    parser.add_keys()
    parser.epilog = (
        "Sampling is as the run's config says; any key of its section sampling, and "
        "seed and vae, can be overridden: --config.sampling.guidance=1.8"
    )


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    out = f"new file, {NPZ}, or {PICTURE} for a grid to look at"
    parser.add_argument("--out", required=True, metavar="FILE", help=out)
    number = f"images (50,000 or one a prompt, of a grid 64 or {COLUMNS} a prompt)"
    parser.add_argument("--num", type=int, help=number)
    prompts = "of a run with captions: a file, one a line, or a prompt"
    parser.add_argument("--prompts", metavar="FILE", help=prompts)
    arguments = parser.parse_args()
    file = new_file(arguments.out, NPZ, PICTURE)
    texts, count = read_prompts(arguments.prompts), arguments.num
    if count is None and file.suffix == PICTURE:
        count = COLUMNS * (len(texts) or COLUMNS)
    elif count is None:
        count = len(texts) or 50_000
    if count < 1:
        raise UserError(f"--num={count}: must be at least 1")
    config = generator.read_settings(arguments.workdir, arguments.overrides)
    if bool(config.text.encoder) != bool(texts):
        raise UserError(
            f"{arguments.workdir}: needs --prompts, it was trained on captions"
            if config.text.encoder
            else f"{arguments.workdir}: was trained on labels: leave out --prompts"
        )
    runtime.join(arguments)
    generate = generator.open_run(
        arguments.workdir, config, arguments.weights, arguments.step
    )
    sample(generate, file, count, texts)
    runtime.part()
