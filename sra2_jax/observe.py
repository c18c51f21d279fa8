"""What a person sees of a run while it trains: pictures, metrics, the report."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from sra2_jax.config import DIGITS
from sra2_jax.data import digits
from sra2_jax.data.order import Order
from sra2_jax.data.pipeline import batches
from sra2_jax.data.pixels import to_png
from sra2_jax.errors import UserError
from sra2_jax.generator import Generator, describe, draw_labels, grid, prompted
from sra2_jax.log import Log
from sra2_jax.metrics import compare
from sra2_jax.metrics.features import Features, make_features
from sra2_jax.metrics.sets import ImageSet, open_images
from sra2_jax.report.page import write_report
from sra2_jax.run import Run
from sra2_jax.runtime import Stop, Watch, anywhere, versions
from sra2_jax.step import Program
from sra2_jax.weights import spelled

# Pictures smaller than this are enlarged, so that a viewer shows them at a usable size.
MIN_PICTURE = 640
# what results.json says of the numbers: of digits, and of all else
PROXIES = (
    "Proxies, not FID: a Fréchet distance to the held-out real digits in the space of "
    "their pixels, made smaller, and the share of samples that a support vector "
    "machine, fitted on the training digits, gives the label asked for."
)
NOTE = (
    "Fréchet distances fall with the number of samples: only those of as many samples "
    "can be compared. Papers print 50,000."
)


class Observer:
    """Samples, scores and reports with one set of compiled functions.

    All processes call it together; one writes. It raises `Stop` between batches of
    samples where a signal has come.

    dataset: folder of the latents. facts: for run.json, the prompts of a grid's rows.

    Raises UserError: config.vae cannot be loaded, or nothing to score against.
    """

    _asked: np.ndarray | None = None  # captions of what is scored

    def __init__(
        self, program: Program, run: Run, log: Log, dataset: Any, watch: Watch
    ) -> None:
        self.config, self.run, self.log = program.config, run, log
        self._watch, self._anywhere = watch, anywhere(program.mesh)
        self._flag: Any = False  # a signal came somewhere, before the batch before
        self.generate = Generator.of(program)
        self.features: Features | None = None
        e, batch = self.config.eval, self.generate.batch
        self._levels: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._labels = self.grid_classes().repeat(self.config.run.grid_columns)
        if e.features:
            weights = getattr(e, e.features, "")
            self.features = make_features(e.features, weights, program.mesh, batch)
        if e.features in DIGITS:
            self._digits(e.features)
            return
        if self.features:
            held = open_images(e.reference, self.config.data.resolution)
            self.reference = compare.summarise_reference(self.features, held, batch)
        # Records of the dataset, decoded.
        rows = self.config.run.grid_classes * self.config.run.grid_columns
        order = replace(Order.of(self.config), batch_size=rows)
        fields = ("captions",) if program.reader else ()
        found = next(batches(dataset, order, fields=fields))
        means = found["mean"].astype(np.float32)
        self._picture(run.images / "reconstruction.png", self.generate.decode(means))
        if program.reader:
            self._captions(found["captions"][: self.config.run.grid_classes, [0, -1]])
        if program.reader and self.features:
            every = replace(order, batch_size=self.config.batch_size)
            parts = batches(dataset, every, fields=fields)
            count = -(-e.num_samples // every.batch_size)
            tokens = [next(parts)["captions"][:, [0, -1]] for _ in range(count)]
            self._asked = np.concatenate(tokens)[: e.num_samples]

    def _captions(self, tokens: np.ndarray) -> None:
        """The rows of a grid: the prompts of the config, or these captions."""
        given = map(str.strip, self.config.text.prompts.split(";"))
        prompts = [prompt for prompt in given if prompt]
        if prompts:
            tokens = prompted(self.config, prompts)
        else:
            with contextlib.suppress(UserError):  # where there is no tokenizer
                prompts = spelled(self.config.text.encoder, tokens[:, 0])
        self.facts["prompts"] = prompts
        self._labels = tokens.repeat(self.config.run.grid_columns, axis=0)

    def _digits(self, name: str) -> None:
        """Pictures of real digits, also through the VAE, and what they score."""
        images, labels = digits.load_digits("test", name)
        columns = self.config.run.grid_columns
        self.reference = self._summary([images], labels)
        decoded = self.generate.decode(self.generate.encode(images))
        rows = [np.flatnonzero(labels == k)[:columns] for k in self.grid_classes()]
        chosen = np.concatenate(rows)
        self._picture(self.run.images / "real.png", images[chosen])
        self._picture(self.run.images / "reconstruction.png", decoded[chosen])
        seen, classes = digits.load_digits("train", name)
        through = self.metrics([decoded], labels)
        self._levels = {
            # the training set's distance; the held-out set's is 0 by definition
            "real_frechet": self.metrics([seen], classes)["frechet"],
            "real_accuracy": self.metrics([images], labels)["accuracy"],
            **{f"reconstruction_{name}": value for name, value in through.items()},
        }

    def _picture(self, path: Any, images: np.ndarray) -> np.ndarray:
        """Write a grid of uint8 images as a PNG; return it."""
        picture = grid(images, self.config.run.grid_columns)
        if self.run.writes:
            factor = max(1, round(MIN_PICTURE / picture.shape[1]))
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            with self.log.trying("pictures"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(to_png(large))
        return picture

    def _summary(
        self, batches: Iterable[np.ndarray], labels: np.ndarray
    ) -> compare.Summary:
        """Of batches of uint8 images, as many in all as labels."""
        assert self.features is not None
        count, side = len(labels), self.config.data.resolution
        shape = count, side, side, 3
        images = ImageSet("samples", shape, lambda _: iter(batches), labels)
        keep = compare.MANIFOLD
        return compare.summarise(self.features, images, count, keep, bar=False)

    def metrics(
        self, images: Iterable[np.ndarray], labels: np.ndarray
    ) -> dict[str, float]:
        """What batches of uint8 images score. UserError where they cannot be scored."""
        assert self.features is not None
        found = self._summary(images, labels)
        return compare.compare(self.features, found, self.reference, neighbours=False)

    def grid_classes(self) -> np.ndarray:
        """The class of each row of a sample grid, spread over all classes."""
        last = self.config.data.num_classes - 1
        return np.linspace(0, last, self.config.run.grid_classes).round().astype(int)

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether samples, and scores, are asked for at `step`."""
        scoring = self.features is not None and step % self.config.eval.every == 0
        return step % self.config.run.sample_every == 0, scoring

    def observe(self, step: int, params: Any, resumed: bool = False) -> None:
        """What is due at `step`; of a run resumed there, what it had not got to."""
        sampling, scoring = self.due(step)
        if sampling and not (resumed and self.run.samples(step).exists()):
            self._sample(step, params)
        if scoring and not (resumed and step in self.log.scores):
            self._score(step, params)

    def _sample(self, step: int, params: Any) -> None:
        """Write samples/step_STEP.png: the same noise and labels at every step."""
        indices = np.arange(len(self._labels))
        parts = self._between(self.generate(indices, self._labels, params))
        try:
            images = np.concatenate([*parts])
        except UserError as error:
            self.log.message(f"step {step}: no picture: {error}")
            return
        picture = self._picture(self.run.samples(step), images)
        self.log.image(step, "samples", picture)

    def _score(self, step: int, params: Any) -> dict[str, float]:
        """Metrics of samples, also written to the log; the same noise at every step.

        Samples that cannot be scored (all alike, say) stop nothing.
        """
        indices = np.arange(self.config.eval.num_samples)
        labels = self._asked
        if labels is None:
            labels = draw_labels(self.config, indices)
        try:
            images = self._between(self.generate(indices, labels, params))
            scores = self.metrics(images, labels)
        except UserError as error:
            self.log.message(f"step {step}: not scored: {error}")
            return {}
        self.log.scalars(step, {f"eval/{k}": v for k, v in scores.items()})
        return scores

    def _between(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same batches; after each, signs of life and a look for signals."""
        for batch in batches:
            yield batch
            self._watch.progress("sample")
            # The flag of the batch before: nobody waits for this one.
            stop, self._flag = self._flag, self._anywhere(bool(self._watch.stopping))
            if stop:
                raise Stop

    def finish(self, step: int, params: Any) -> None:
        """Last samples, results.json (the mark of a finished run) and the report."""
        self._sample(step, params)
        results: dict[str, Any] = {"step": step, "weights": "ema"}
        results |= describe(self.config)
        if self.features is not None:
            results |= {
                "num_samples": self.config.eval.num_samples,
                "metrics": self._score(step, params),
                "reference": self._levels,
                **self.features.facts,
                "note": PROXIES if self.features.kind in DIGITS else NOTE,
            }
        self.run.write("results", results | {"versions": versions()})
        self.report()

    def report(self) -> None:
        """Write report.html anew."""
        if self.run.writes:
            with self.log.trying("report.html"):
                write_report(self.run.folder)
