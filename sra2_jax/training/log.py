"""What a run writes while it goes: metrics.jsonl, TensorBoard, console."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sra2_jax.data import records

FIRST = ("loss", "loss_denoise")


class Log:
    """Writes rows of scalars, one every `log_every` steps, means over those steps.

    Rows go to metrics.jsonl, TensorBoard and, through clu, the console; a terminal
    gets a progress bar instead. Only process 0 writes. Rows later than `start`, left
    by a run that was cut off after its last checkpoint, are dropped.
    """

    def __init__(
        self, workdir: Path, *, start: int, steps: int, batch_size: int, log_every: int
    ) -> None:
        self._active = jax.process_index() == 0
        self._batch_size, self._every, self._steps = batch_size, log_every, steps
        self._rows: list[dict[str, float]] = []
        self._clock = time.perf_counter()
        path = workdir / "metrics.jsonl"
        kept = _rows_until(path, start)
        # steps with a row of evaluations
        self.scored = {
            row["step"] for row in kept if any(key.startswith("eval/") for key in row)
        }
        if not self._active:
            return
        # clu's writers import TensorFlow (seconds): here, and on this process only.
        records.tensorflow()  # first, so that it takes no GPU
        from clu import metric_writers

        fresh = workdir / "metrics.jsonl.tmp"
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(path)  # whole, or as it was
        self._file = path.open("a")
        self._tensorboard = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        self._console = metric_writers.LoggingWriter()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, unit="step", smoothing=0.05)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step; waits until the device has finished it."""
        self._rows.append({k: float(v) for k, v in jax.device_get(metrics).items()})
        if self._active and self._bar is not None:
            self._bar.update(1)
        if step % self._every and step != self._steps:
            return
        now = time.perf_counter()
        count, elapsed = len(self._rows), now - self._clock
        row = {k: float(np.mean([r[k] for r in self._rows])) for k in self._rows[0]}
        row["images_per_second"] = count * self._batch_size / elapsed
        self._rows, self._clock = [], now
        left = (self._steps - step) * elapsed / count
        if not self._active:
            return
        if self._bar is not None:
            terms = [k for k in row if k.startswith("loss_align")]
            shown = {k: f"{row[k]:.4f}" for k in (*FIRST, *terms)}
            shown["images/s"] = f"{row['images_per_second']:.0f}"
            self._bar.set_postfix(shown)
        else:
            self._console.write_scalars(step, row | {"seconds_left": round(left)})
        self.scalars(step, row)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write a row that has its own time (evaluations)."""
        if self._active:
            ordered = {k: row[k] for k in FIRST if k in row} | row
            self._file.write(json.dumps({"step": step} | ordered) + "\n")
            self._file.flush()
            self._tensorboard.write_scalars(step, row)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image (H, W, 3) to TensorBoard."""
        if self._active:
            self._tensorboard.write_images(step, {name: image[None]})

    def message(self, text: str) -> None:
        """One line for a person."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside from images_per_second."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def close(self) -> None:
        """Flush and close the writers."""
        if self._active:
            self._tensorboard.flush()
            self._tensorboard.close()
            self._file.close()
            if self._bar is not None:
                self._bar.close()


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl up to `step`; a torn last line is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows
