"""Sample images from a run: python -m sra2_jax sample RUN --out=samples.npz.

Writes ADM's format: arr_0, uint8 (N, H, W, 3); beside it arr_1, the labels, and
settings, a JSON text with everything that made them. Image i depends on the seed and i
alone. A program that was killed goes on where it was when run again: finished shards
stay in samples.shards/ until the .npz is whole. Runs without TensorFlow.
"""

import argparse
import json
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from sra2_jax import distributed
from sra2_jax.command import run_program
from sra2_jax.errors import UserError
from sra2_jax.generate import batch_size, draw_labels
from sra2_jax.metrics.archive import write_npz
from sra2_jax.programs.shards import Shards
from sra2_jax.programs.subject import (
    Subject,
    add_arguments,
    open_subject,
    read_settings,
)


def fill(shards: Shards, subject: Subject) -> None:
    """Make the shards that are missing, with all processes; each writes its share."""
    # Process 0 says which: another one may not see a new file yet.
    numbers = shards.missing()
    if jax.process_count() > 1:
        most = -(-shards.count // shards.size)
        mask = np.isin(np.arange(most), numbers)
        numbers = np.flatnonzero(multihost_utils.broadcast_one_to_all(mask))
    if not numbers.size:
        return
    indices = np.concatenate([shards.indices(n) for n in numbers])
    labels = draw_labels(subject.config, indices)
    generate = subject.make(subject.config)
    queue, waiting = list(numbers), np.empty(0)
    bar = tqdm(
        total=shards.count,
        initial=shards.count - len(indices),
        unit="image",
        disable=jax.process_index() > 0,
    )
    with bar:
        for images in generate(subject.params, indices, labels):
            waiting = np.concatenate([waiting, images]) if waiting.size else images
            while queue and len(waiting) >= (n := len(shards.indices(queue[0]))):
                number = queue.pop(0)
                if number % jax.process_count() == jax.process_index():
                    shards.write(number, waiting[:n])
                waiting = waiting[n:]
            bar.update(len(images))


def sample(
    subject: Subject, out: epath.Path, count: int, settings: dict[str, Any]
) -> None:
    """Write `count` samples to `out`, from where an earlier call was cut off.

    Raises:
      UserError: shards of other samples are in the way.
    """
    began = time.perf_counter()
    config = subject.config
    folder = out.with_suffix(".shards")
    batch = batch_size(config, subject.mesh)
    if jax.process_index() == 0:
        Shards(folder, settings, count, batch)  # writes what the others read
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("settings of the samples")
    shards = Shards(folder, settings, count, batch)
    fill(shards, subject)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("samples")
    if jax.process_index() > 0:
        return
    side = config.data.resolution
    write_npz(
        out,
        {
            "arr_1": draw_labels(config, np.arange(count)),
            "settings": np.array(json.dumps(shards.settings)),
        },
        images=shards.read(),
        shape=(count, side, side, 3),
    )
    folder.rmtree()
    print(f"{out}: {count:,} images in {time.perf_counter() - began:.0f} s")


def vacant(text: str) -> epath.Path:
    """The path of a new .npz.

    Raises:
      UserError: another kind of file, or one that exists.
    """
    out = epath.Path(text)
    if out.suffix != ".npz":
        raise UserError(f"--out={text}: must end in .npz")
    if out.exists():
        raise UserError(f"--out={text}: exists already: remove it or use another")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="new file")
    parser.add_argument("--num", type=int, default=50_000, help="images (%(default)s)")
    arguments, overrides = parser.parse_known_args()
    out = vacant(arguments.out)
    if arguments.num < 1:
        raise UserError(f"--num={arguments.num}: must be at least 1")
    config = read_settings(arguments.workdir, overrides)
    distributed.initialize(arguments)
    subject = open_subject(config, arguments.workdir, arguments.weights, arguments.step)
    sample(subject, out, arguments.num, subject.settings | {"count": arguments.num})
    distributed.finish()


if __name__ == "__main__":
    run_program(main)
