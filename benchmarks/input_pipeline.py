"""Time the input pipeline: records of made-up latents, read as training reads them.

    python -m benchmarks.input_pipeline --records=40000

Writes the records to a temporary folder, reads shuffled batches of them through
`sra2_jax.data.pipeline.batches`, once as numpy arrays and once placed on the devices,
and prints records a second and records a CPU second (of all threads), and how long a
run that resumes at the end of an epoch waits for its first batch. With --train, also
times the training step fed with them against one made-up batch, by turns.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sra2_jax.command import Parser, run_program, writable
from sra2_jax.config import Config
from sra2_jax.data import records
from sra2_jax.data.build import manifest, writing
from sra2_jax.data.order import Order
from sra2_jax.data.pipeline import batches, prefetch_to_device
from sra2_jax.errors import UserError
from sra2_jax.sharding import batch_sharding, make_mesh
from tools.measure import machine, prepare, spread, turns, write


def write_records(folder: Path, config: Config, count: int, shards: int) -> None:
    """A dataset of latents, numbers made up, of the config's shape."""
    shape, draw = config.latent_shape, np.random.default_rng(0)
    pool = np.abs(draw.normal(size=(64, *shape))).astype(np.float16)
    with writing(folder, "train", np.arange(count) % shards, range(shards)) as writer:
        for i in range(count):
            arrays = {"mean": pool[i % 64], "std": pool[i % 61]}
            label = i % config.data.num_classes
            writer.write(label, i, **arrays)
    info = records.LatentsInfo(
        vae=config.vae,
        scaling_factor=config.latents.scaling_factor,
        shift_factor=config.latents.shift_factor,
        resolution=config.data.resolution,
        latent_shape=shape,
        num_examples=count,
        num_classes=config.data.num_classes,
        class_names=(),
        splits={"train": manifest(list(writer.facts.values()))},
        latent_mean=(0.0,) * shape[-1],
        latent_std=(1.0,) * shape[-1],
        crop="centre",
        versions={},
    )
    info.write(folder)


def read(
    rows: Iterator[Any], config: Config, count: int, epoch: int
) -> dict[str, float]:
    """Records a wall and a CPU second over `count` batches, after `epoch` of them: by
    then the files are in the page cache."""
    batch_size = config.batch_size
    for _ in range(epoch):
        jax.block_until_ready(next(rows))
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        jax.block_until_ready(next(rows))
    wall, cpu = time.perf_counter() - began, time.process_time() - processor
    return {
        "records_per_second": count * batch_size / wall,
        "records_per_cpu_second": count * batch_size / cpu,
    }


def read_cases(
    folder: Path, config: Config, count: int, rounds: int, epoch: int
) -> list[dict[str, Any]]:
    """Numpy batches and batches on the devices, by turns."""
    sharding = batch_sharding(make_mesh())
    found: dict[str, list[dict[str, float]]] = {"numpy": [], "on devices": []}
    for _, name in turns(list(found), rounds - 1):
        rows = batches(folder, Order.of(config))
        if name == "numpy":
            found[name].append(read(rows, config, count, epoch))
        else:
            with closing(prefetch_to_device(rows, sharding)) as placed:
                found[name].append(read(placed, config, count, epoch))
    cases = []
    for name, results in found.items():
        row = {k: spread([r[k] for r in results]) for k in results[0]}
        wall, cpu = row["records_per_second"], row["records_per_cpu_second"]
        print(
            f"{name}: {wall['p50']:,.0f} records a second, {cpu['p50']:,.0f} a CPU "
            f"second ({cpu['p10']:,.0f} to {cpu['p90']:,.0f})",
            flush=True,
        )
        cases.append({"case": f"input pipeline, {name}", **row})
    return cases


def resume_case(
    folder: Path, config: Config, count: int, rounds: int
) -> dict[str, Any]:
    """Seconds to the first batch of a new run and of one that has read all records."""
    last = count // config.batch_size
    waits: dict[int, list[float]] = {0: [], last: []}
    for _, start in turns(list(waits), rounds - 1):
        began = time.perf_counter()
        next(batches(folder, Order.of(config), start))
        waits[start].append(time.perf_counter() - began)
    row = {
        "case": "input pipeline, resumed",
        "records_skipped": last * config.batch_size,
        "first_batch_seconds": spread(waits[0]),
        "resumed_first_batch_seconds": spread(waits[last]),
    }
    print(
        f"first batch: {spread(waits[0])['p50']:.2f} s, "
        f"{spread(waits[last])['p50']:.2f} s beyond {row['records_skipped']:,} records"
    )
    return row


def train_case(folder: Path, config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """The step fed with records over the step fed with one made-up batch."""
    run = prepare(config)
    fed: dict[str, list[float]] = {"made up": [], "records": []}
    sharding = batch_sharding(run.program.mesh)
    rows = batches(folder, Order.of(config))
    with closing(prefetch_to_device(rows, sharding)) as placed:
        for number, name in turns(list(fed), rounds):
            began = time.perf_counter()
            for _ in range(steps):
                batch = run.batch
                if name == "records":
                    batch = {k: v for k, v in next(placed).items() if k in run.batch}
                metrics = run(batch)
            jax.block_until_ready((run.state, metrics))
            if number:
                fed[name].append((time.perf_counter() - began) / steps)
    ratios = np.array(fed["records"]) / np.array(fed["made up"])
    row = {
        "case": f"{config.name}, batch {config.batch_size}, fed",
        "step_seconds": spread(fed["records"]),
        "time_over_made_up": spread(list(ratios)),
    }
    print(
        f"{config.name}, batch {config.batch_size}: {spread(fed['records'])['p50']:.3f}"
        f" s a step, {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
        " of the time with a made-up batch"
    )
    return row


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--records", type=int, default=40_000, help="to write (%(default)s)")
    add("--batches", type=int, default=200, help="to read in a round (%(default)s)")
    add("--rounds", type=int, default=3)
    add("--train", action="store_true", help="time the training step as well")
    add("--steps", type=int, default=5, help="of the training step a round")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_xl")
    shards = 16
    if arguments.records < max(config.batch_size, shards):
        raise UserError(f"--records={arguments.records}: give at least one batch")
    facts = machine()
    print(f"{facts['devices']} x {facts['device']}, jax {facts['jax']}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder, config, arguments.records, shards)
        epoch = arguments.records // config.batch_size
        count, rounds = arguments.batches, arguments.rounds
        rows = read_cases(folder, config, count, rounds, epoch)
        rows.append(resume_case(folder, config, arguments.records, rounds))
        if arguments.train:
            rows.append(train_case(folder, config, rounds, arguments.steps))
    write(arguments.json, facts, rows)


if __name__ == "__main__":
    run_program(main)
