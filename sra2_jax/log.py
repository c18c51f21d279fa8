"""What a run writes while it goes: metrics.jsonl, TensorBoard, console."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sra2_jax.data import records
from sra2_jax.errors import UserError

FIRST = ("loss", "loss_denoise")
DISTANCES = ("eval/fid", "eval/frechet")


class Log:
    """Writes rows of scalars, one every `log_every` steps, means over those steps.

    Rows go to metrics.jsonl, TensorBoard and, through clu, the console; a terminal
    gets a progress bar instead. Only process 0 writes. Rows later than `start`, left
    by a run that was cut off after its last checkpoint, are dropped. events.jsonl keeps
    what happened, with its time, over all restarts. What cannot be written is said once
    and stops nothing; rows are written later, when they can be.

    Args:
      unlogged: metrics of the steps up to `start` that no row has yet, as `unlogged`
        gave them; so that a resumed run writes the rows of an uninterrupted one.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        log_every: int,
        unlogged: Sequence[dict[str, float]] = (),
    ) -> None:
        self._active = jax.process_index() == 0
        self._batch_size, self._every, self._steps = batch_size, log_every, steps
        self._step = start
        self.unlogged = list(unlogged)
        self._count = 0  # of them, since the clock was set
        self._clock = time.perf_counter()
        self._failed: set[str] = set()  # writers
        path = workdir / "metrics.jsonl"
        kept = _rows_until(path, start)
        # what was evaluated, by step
        self.scores = {
            row["step"]: row for row in kept if any(k.startswith("eval/") for k in row)
        }
        if not self._active:
            return
        # clu's writers import TensorFlow (seconds): here, and on this process only.
        records.tensorflow()  # first, so that it takes no GPU
        from clu import metric_writers

        fresh = workdir / "metrics.jsonl.tmp"
        try:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
            fresh.replace(path)  # whole, or as it was
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}): free some "
                "space or use another --workdir"
            ) from error
        self._rows, self._events = Lines(path), Lines(workdir / "events.jsonl")
        self._tensorboard = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        self._console = metric_writers.LoggingWriter()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, unit="step", smoothing=0.05)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step."""
        self._step = step
        self.unlogged.append(metrics)
        self._count += 1
        if self._active and self._bar is not None:
            self._bar.update(1)
        if step % self._every and step != self._steps:
            return
        now = time.perf_counter()
        elapsed = now - self._clock
        row = mean(self.unlogged)
        row["images_per_second"] = self._count * self._batch_size / elapsed
        left = (self._steps - step) * elapsed / self._count
        self.unlogged, self._count, self._clock = [], 0, now
        if not self._active:
            return
        if self._bar is not None:
            terms = [k for k in row if k.startswith("loss_align")]
            shown = {k: f"{row[k]:.4f}" for k in (*FIRST, *terms) if k in row}
            shown["images/s"] = f"{row['images_per_second']:.0f}"
            self._bar.set_postfix(shown)
        else:
            self._console.write_scalars(step, row | {"seconds_left": round(left)})
        self.scalars(step, row)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write a row that has its own time (evaluations)."""
        if any(key.startswith("eval/") for key in row):
            self.scores[step] = row
        if self._active:
            ordered = {k: row[k] for k in FIRST if k in row} | row
            with self.trying("metrics.jsonl"):
                self._rows.write({"step": step} | ordered)
            with self.trying("TensorBoard"):
                self._tensorboard.write_scalars(step, row)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image (H, W, 3) to TensorBoard."""
        if self._active:
            with self.trying("TensorBoard"):
                self._tensorboard.write_images(step, {name: image[None]})

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Write down that something happened."""
        if self._active:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            row = {"time": when, "step": step, "event": kind} | facts
            with self.trying("events.jsonl"):
                self._events.write(row)

    @contextmanager
    def trying(self, writer: str) -> Iterator[None]:
        """What cannot be written must not end weeks of training; said once a writer."""
        try:
            yield
        except Exception as error:  # of TensorFlow, of the disk, of the network
            if writer not in self._failed:
                self._failed.add(writer)
                reason = " ".join(str(error).split())[:200]
                self.message(
                    f"{writer} cannot be written ({type(error).__name__}: {reason}): "
                    "training goes on; this is said once"
                )

    def score(self, step: int) -> float:
        """The Fréchet distance of a step's samples; infinity where it has none."""
        row = self.scores.get(step, {})
        found = [row[key] for key in DISTANCES if key in row]
        return float(found[0]) if found else float("inf")

    def report(self, line: str) -> None:
        """A line for a person that is also an event."""
        self.message(line)
        self.event(self._step, "report", line=line)

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
            for lines in (self._rows, self._events):
                with self.trying(lines.path.name):
                    lines.write()
            with self.trying("TensorBoard"):
                self._tensorboard.flush()
                self._tensorboard.close()
            if self._bar is not None:
                self._bar.close()


class Lines:
    """JSON lines appended to a file, each whole: what failed is written later."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        text = path.read_bytes() if path.exists() else b""
        self._size = len(text)
        # A line torn by a crash stays alone.
        self._waiting = b"\n" if text and not text.endswith(b"\n") else b""

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows, after those that could not be written before.

        Raises:
          OSError: not now; they are kept.
        """
        self._waiting += b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if not self._waiting:
            return
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError:
            with contextlib.suppress(OSError):  # no torn line before the next try
                os.truncate(self.path, self._size)
            raise
        self._size += len(self._waiting)
        self._waiting = b""


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the steps whose update was not skipped, if any, and
    the number of those skipped, if any."""
    good = [row for row in rows if not row["skipped"]]
    row = {
        k: float(np.mean([r[k] for r in good]))
        for k in (good[0] if good else {})
        if k != "skipped"
    }
    if skipped := len(rows) - len(good):
        row["skipped"] = skipped
    return row


def _rows_until(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl up to `step`; a torn last line is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", step + 1) <= step:
            rows.append(row)
    return rows
