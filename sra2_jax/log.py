"""What a run writes while it goes: metrics.jsonl, TensorBoard, console, events; and a
look at the numbers of every step."""

import json
import math
import os
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tqdm import tqdm

from sra2_jax.config import Config
from sra2_jax.data.pixels import to_png
from sra2_jax.errors import UserError, one_line
from sra2_jax.run import Run
from sra2_jax.runtime import tensorflow
from sra2_jax.storage import Appended, write_whole
from sra2_jax.tfrecord import field, frame, varint

FIRST = ("loss", "loss_denoise")
DISTANCES = ("eval/fid", "eval/fd_dinov2", "eval/frechet")
WINDOW, ENOUGH = 200, 50  # losses that a new one is held against, at least so many
SPIKE = 6.0  # standard deviations
UPLOAD_SECONDS = 60.0  # between two writes of TensorBoard's file in a bucket


class Log:
    """Writes rows of scalars, means over config.run.log_every steps, to metrics.jsonl,
    TensorBoard and the console, where a terminal gets a progress bar instead;
    events.jsonl keeps what happened, over all restarts. What cannot be written is said
    once and stops nothing. A context manager; `restart` comes before all else.

    mfu: of one image a second, the share of the devices' peak; 0: it is not known.

    Attributes:
      unlogged: metrics of the steps that no row has yet.
      scores: rows of what was evaluated, by step.
    """

    def __init__(self, run: Run, config: Config, mfu: float = 0.0) -> None:
        self._run, self._config, self._mfu = run, config, mfu
        self._step, self._count, self._clock = 0, 0, 0.0
        self._failed: set[str] = set()  # writers
        self._tensorboard: Any = None
        self._files: dict[str, Appended] = {}
        self._bar = tqdm(disable=True)
        self.unlogged: list[dict[str, float]] = []
        self.scores: dict[int, dict[str, float]] = {}

    def restart(self, step: int, unlogged: Sequence[dict[str, float]] = ()) -> None:
        """Begin at a step, with `unlogged` as it was saved with it. Later rows, left by
        a run that was cut off, are dropped. Raises OSError where metrics.jsonl cannot
        be written."""
        kept = [row for row in self._run.rows() if row["step"] <= step]
        self.scores = {row["step"]: row for row in kept if _scores(row)}
        self.unlogged = list(unlogged)
        self._step, self._count, self._clock = step, 0, time.perf_counter()
        if not self._run.writes:
            return
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_whole(self._run.metrics, text)
        if self._config.run.clu:
            tensorflow()  # first, so that it takes no GPU
            from clu.metric_writers import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._run.tensorboard))
        else:
            self._tensorboard = EventWriter(self._run.tensorboard)
        bar = {"total": self._config.steps, "initial": step, "unit": "step"}
        # None: on a terminal alone.
        self._bar = tqdm(**bar, smoothing=0.05, disable=None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step."""
        config, self._step = self._config, step
        self.unlogged.append(metrics)
        self._count += 1
        self._bar.update(1)
        if step % config.run.log_every and step != config.steps:
            return
        now = time.perf_counter()
        speed = self._count * config.batch_size / (now - self._clock)
        row = mean(self.unlogged) | {"images_per_second": speed}
        if self._mfu:
            row["mfu"] = self._mfu * speed
        self.unlogged, self._count, self._clock = [], 0, now
        if not self._bar.disable:
            losses = {k: f"{v:.4f}" for k, v in row.items() if k.startswith("loss")}
            self._bar.set_postfix(losses | {"images/s": f"{speed:.0f}"})
        else:
            left = round((config.steps - step) * config.batch_size / speed)
            shown = sorted((row | {"seconds_left": left}).items())
            texts = (f"{name}={value:.6g}" for name, value in shown)
            self.message(f"{time.strftime('%H:%M:%S')} [{step}] {', '.join(texts)}")
        self.scalars(step, row)

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write a row that has its own time (evaluations)."""
        if _scores(row):
            self.scores[step] = row
        if self._run.writes:
            ordered = {k: row[k] for k in FIRST if k in row} | row
            self._append(self._run.metrics, {"step": step} | ordered)
            with self.trying("TensorBoard"):
                self._tensorboard.write_scalars(step, row)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image (H, W, 3) to TensorBoard."""
        if self._run.writes:
            with self.trying("TensorBoard"):
                self._tensorboard.write_images(step, {name: image[None]})

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Write down that something happened."""
        if self._run.writes:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            row = {"time": when, "step": step, "event": kind} | facts
            self._append(self._run.events, row)

    def _append(self, path: Any, row: dict[str, Any]) -> None:
        with self.trying(path.name):
            if path.name not in self._files:
                self._files[path.name] = Appended(path)
            self._files[path.name].write(json.dumps(row).encode() + b"\n")

    @contextmanager
    def trying(self, writer: str) -> Iterator[None]:
        """What cannot be written must not end weeks of training; said once a writer."""
        try:
            yield
        except Exception as error:  # of the disk, of the network, of clu
            if writer not in self._failed:
                self._failed.add(writer)
                self.message(
                    f"{writer} cannot be written ({one_line(error)}): training goes "
                    "on; this is said once"
                )

    def score(self, step: int) -> float:
        """The Fréchet distance of a step's samples; infinity where it has none."""
        row = self.scores.get(step, {})
        return next((row[key] for key in DISTANCES if key in row), math.inf)

    def report(self, line: str) -> None:
        """A line for a person that is also an event."""
        self.message(line)
        self.event(self._step, "report", line=line)

    def message(self, text: str) -> None:
        """One line for a person."""
        if self._run.writes:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside from images_per_second."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            with self.trying("TensorBoard"):
                self._tensorboard.close()
        for name, file in self._files.items():
            with self.trying(name):
                file.close()
        self._bar.close()


def _scores(row: dict[str, Any]) -> bool:
    """Whether a row is of an evaluation."""
    return any(key.startswith("eval/") for key in row)


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


class EventWriter:
    """TensorBoard's event file, with the methods of clu's writers.

    Source: TensorFlow's `event.proto` and `summary.proto`.
    """

    def __init__(self, folder: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        path = folder / f"events.out.tfevents.{unique}"
        self._file = Appended(path, UPLOAD_SECONDS)
        self._write(field(3, b"brain.Event:2"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {k: b"\x15" + struct.pack("<f", v) for k, v in scalars.items()}
        self._summary(step, values)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: uint8 (N, H, W, 3), of which the first is written."""
        values = {}
        for name, (image, *_) in images.items():
            height, width, colours = map(varint, image.shape)
            facts = b"\x08" + height + b"\x10" + width + b"\x18" + colours
            values[name] = field(4, facts + field(4, to_png(image)))
        self._summary(step, values)

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int, values: Mapping[str, bytes]) -> None:
        rows = (field(1, field(1, k.encode()) + v) for k, v in values.items())
        self._write(b"\x10" + varint(step) + field(5, b"".join(rows)))

    def _write(self, event: bytes) -> None:
        self._file.write(frame(b"\x09" + struct.pack("<d", time.time()) + event))


class Profile:
    """A trace by jax.profiler of the steps that config.run.profile_steps names, in
    RUN/profile; each process writes its own. TensorBoard and Perfetto read it."""

    def __init__(self, run: Run, config: Config) -> None:
        first, _, last = config.run.profile_steps.partition(":")
        self._run, self._first, self._last = run, int(first or 0), int(last or 0)
        self._folder: Any = None

    def before(self, step: int) -> None:
        """Begin where `step` is the first, or the first of a resumed run."""
        if not self._folder and self._first <= step <= self._last:
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name)

    def after(self, step: int, results: Any) -> None:
        """End where `step` is the last; results: what it computes."""
        if self._folder and step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            for path in Path(self._folder.name).rglob("*.*"):
                there = self._run.profile / path.relative_to(self._folder.name)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(path.read_bytes())
            self._folder.cleanup()


class Guard:
    """Finds updates that were skipped, of which `most_skipped` in a row are borne, and
    losses that jump; writes them to the log's events, with the batch's records."""

    def __init__(self, most_skipped: int, log: Log) -> None:
        self._most, self._log = most_skipped, log
        self._skipped: list[int] = []  # steps, in a row
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(
        self, step: int, metrics: dict[str, float], records: Callable[[], list[int]]
    ) -> None:
        """Take a step's metrics, the same on all processes, which call it together.
        records: gives the `index` of each record of the batch.

        Raises UserError: more updates skipped in a row than are borne.
        """
        if metrics["skipped"]:
            self._skip(step, metrics, records())
            return
        self._skipped, loss = [], metrics["loss"]
        if len(self._losses) >= ENOUGH:
            mean, std = float(np.mean(self._losses)), float(np.std(self._losses))
            # The floor is for losses that are all alike.
            z = (loss - mean) / max(std, 1e-6 * abs(mean), 1e-30)
            if z > SPIKE:
                self._log.event(step, "spike", loss=loss, z=z, records=records())
                self._log.message(
                    f"step {step}: loss {loss:.4g} is {z:.1f} standard deviations "
                    f"above that of the last {len(self._losses)} steps"
                )
        self._losses.append(loss)

    def _skip(self, step: int, metrics: dict[str, float], records: list[int]) -> None:
        self._skipped.append(step)
        bad = sorted(k for k, v in metrics.items() if not math.isfinite(v))
        self._log.event(step, "skipped", not_finite=bad, records=records)
        line = f"{', '.join(bad)} not finite"
        self._log.message(f"step {step}: {line}: the update was skipped")
        if len(self._skipped) > self._most:
            raise UserError(
                f"the updates of steps {self._skipped[0]} to {step} were all skipped, "
                f"more than config.run.most_skipped={self._most} ({line}): lower the "
                "learning rate or an alignment's weight, or look at the records that "
                "events.jsonl names"
            )
