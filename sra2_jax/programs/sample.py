"""Sample images from a run: python -m sra2_jax sample RUN --out=samples.npz.

Writes ADM's format: arr_0, uint8 (N, H, W, 3); beside it arr_1, the labels, and
settings, a JSON text with everything that made them. Image i depends on the seed and i
alone. A program that was killed goes on where it was when run again: finished parts
stay in samples.shards/ until the .npz is whole. Runs without TensorFlow.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from sra2_jax import runtime
from sra2_jax.command import Parser, add_distributed
from sra2_jax.errors import UserError
from sra2_jax.generator import (
    Generator,
    draw_labels,
    open_run,
    read_settings,
    refuse_others,
)
from sra2_jax.metrics.sets import write_npz
from sra2_jax.run import as_json, read_json, write_whole

FILE = "settings.json"
IMAGES = 1024  # of a part, about


class Parts:
    """Images 0 ... count - 1, uint8 (H, W, 3), in files of `size` consecutive ones.

    Args:
      folder: made where missing; its settings.json says what the images are.
      settings: as `describe` gives them.
      count, batch: number of images, and how many are made at a time.

    Raises:
      UserError: the folder holds images made with other settings.
    """

    def __init__(
        self, folder: epath.Path, settings: dict[str, Any], count: int, batch: int
    ) -> None:
        self.folder, path = folder, folder / FILE
        if path.exists():
            saved = read_json(path)
            refuse_others(folder, saved, settings)
            settings = saved
        else:
            # Whole batches: whoever goes on later makes the same ones.
            settings = settings | {"shard": batch * max(1, IMAGES // batch)}
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, as_json(settings))
        self.settings = settings
        starts = range(0, count, settings["shard"])
        self.indices = [
            np.arange(start, min(start + settings["shard"], count)) for start in starts
        ]

    def _file(self, number: int) -> epath.Path:
        return self.folder / f"{number:06d}.npy"

    def missing(self) -> np.ndarray:
        """Whether each part is not there yet."""
        numbers = range(len(self.indices))
        return np.array([not self._file(n).exists() for n in numbers])

    def write(self, number: int, images: np.ndarray) -> None:
        """A whole part or none: a file is renamed once it is complete."""
        fresh = self.folder / f"{number:06d}.tmp"
        with fresh.open("wb") as file:
            np.save(file, images)
        fresh.replace(self._file(number))

    def read(self) -> Iterator[np.ndarray]:
        """All parts in order.

        Raises:
          UserError: a damaged one. It is removed: the same command makes it again.
        """
        for number, indices in enumerate(self.indices):
            path = self._file(number)
            try:
                with path.open("rb") as file:
                    images = np.load(file, allow_pickle=False)
                if len(images) != len(indices):
                    raise ValueError
            except (OSError, ValueError, EOFError) as error:
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: was damaged and is removed: run the same command again"
                ) from error
            yield images


def fill(parts: Parts, generate: Generator) -> None:
    """Make the parts that are missing, with all processes; each writes its share."""
    missing = parts.missing()
    if jax.process_count() > 1:
        # Process 0 says which: another one may not see a new file yet.
        missing = multihost_utils.broadcast_one_to_all(missing)
    queue = np.flatnonzero(missing).tolist()
    if not queue:
        return
    indices = np.concatenate([parts.indices[n] for n in queue])
    count, waiting = parts.indices[-1][-1] + 1, np.empty(0)
    bar = tqdm(
        total=count,
        initial=count - len(indices),
        unit="image",
        disable=jax.process_index() > 0,
    )
    with bar:
        for images in generate(indices, draw_labels(generate.config, indices)):
            waiting = np.concatenate([waiting, images]) if waiting.size else images
            while queue and len(waiting) >= (n := len(parts.indices[queue[0]])):
                number = queue.pop(0)
                if number % jax.process_count() == jax.process_index():
                    parts.write(number, waiting[:n])
                waiting = waiting[n:]
            bar.update(len(images))


def sample(generate: Generator, out: epath.Path, count: int) -> None:
    """Write `count` samples to `out`, from where an earlier call was cut off.

    Raises:
      UserError: parts of other samples are in the way.
    """
    began = time.perf_counter()
    config, folder = generate.config, out.with_suffix(".shards")
    made = folder, generate.settings | {"count": count}, count
    if jax.process_index() == 0:
        Parts(*made, generate.batch)  # writes what the others read
    multihost_utils.sync_global_devices("settings of the samples")
    parts = Parts(*made, generate.batch)
    fill(parts, generate)
    multihost_utils.sync_global_devices("samples")
    if jax.process_index() > 0:
        return
    side = config.data.resolution
    arrays = {
        "arr_1": draw_labels(config, np.arange(count)),
        "settings": np.array(json.dumps(parts.settings)),
    }
    write_npz(out, arrays, parts.read(), (count, side, side, 3))
    folder.rmtree()
    print(f"{out}: {count:,} images in {time.perf_counter() - began:.0f} s")


def new_file(flag: str, text: str, suffix: str) -> epath.Path:
    """The path of a new file, whose folder is made.

    Raises:
      UserError: it exists, has another suffix, or can have no such folder.
    """
    out = epath.Path(text)
    if out.suffix != suffix:
        raise UserError(f"--{flag}={text}: must end in {suffix}")
    if out.exists():
        raise UserError(f"--{flag}={text}: exists already: remove it or use another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={text}: {error.strerror}: use another") from error
    return out


def add_run_arguments(parser: Parser) -> None:
    """The flags that name a run and its weights."""
    add = parser.add_argument
    add("workdir", metavar="RUN", help="folder of a run")
    add("--step", type=int, help="of the checkpoint (the newest)")
    add("--weights", choices=("ema", "raw"), default="ema", help="(%(default)s)")
    add_distributed(parser)
    parser.add_keys()
    parser.epilog = (
        "Sampling is as the run's config says; any key of its section sampling, and "
        "seed, vae and model.dtype, can be overridden: "
        "--config.sampling.guidance=1.8"
    )


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="new file")
    parser.add_argument("--num", type=int, default=50_000, help="images (%(default)s)")
    arguments = parser.parse_args()
    out = new_file("out", arguments.out, ".npz")
    if arguments.num < 1:
        raise UserError(f"--num={arguments.num}: must be at least 1")
    config = read_settings(arguments.workdir, arguments.overrides)
    runtime.join(arguments)
    generate = open_run(arguments.workdir, config, arguments.weights, arguments.step)
    sample(generate, out, arguments.num)
    runtime.part()
