"""What a person sees of a run while it trains: pictures, metrics, the report."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from PIL import Image

from sra2_jax.data.digits import load_digits
from sra2_jax.data.pipeline import batches
from sra2_jax.errors import UserError
from sra2_jax.generate import (
    Generator,
    batch_size,
    describe,
    draw_labels,
    grid,
    to_uint8,
)
from sra2_jax.log import Log
from sra2_jax.metrics.compare import Summary, compare, summarise, summarise_reference
from sra2_jax.metrics.features import Features, make_features
from sra2_jax.metrics.sets import open_images
from sra2_jax.report.page import write_report
from sra2_jax.sharding import replicated
from sra2_jax.versions import versions
from sra2_jax.weights import load_vae
from sra2_jax.workdir import write_whole

# Pictures smaller than this are enlarged, so that a viewer shows them at a usable size.
MIN_PICTURE = 640
RESULTS = "results.json"
Alive = Callable[[], None]
# what results.json says of the numbers
NOTES = {
    "digits": "Proxies, not FID: a Fréchet distance to the 360 held-out real digits "
    "between Gaussians fitted in a 64-dimensional pixel space on a few hundred images, "
    "and the share of samples that a support vector machine fitted on the 1,437 real "
    "training digits gives the label asked for.",
    "inception": "Fréchet distances fall with the number of samples: only those of as "
    "many samples can be compared. Papers print 50,000.",
}


class Observer:
    """Samples, scores and reports with one set of compiled functions.

    All processes call it together; process 0 writes.

    Raises:
      UserError: config.vae cannot be loaded.
    """

    def __init__(
        self, config: ConfigDict, workdir: epath.Path, mesh: Mesh, log: Log
    ) -> None:
        self.config, self.workdir, self.log = config, workdir, log
        self.vae, vae_params = load_vae(config.vae)
        self.vae_params = jax.device_put(vae_params, replicated(mesh))
        self.generate = Generator(config, mesh, self.vae, self.vae_params)
        self.encode = jax.jit(self._encode)
        self.decode = jax.jit(self._decode)
        self.features, self.reference = None, None
        if config.eval.features:
            self.features, self.reference = self._scorer(mesh)

    def _scorer(self, mesh: Mesh) -> tuple[Features, Summary]:
        """The network that scores samples, and what they are held against."""
        e, batch = self.config.eval, batch_size(self.config, mesh)
        features = make_features(e.features, e.inception, mesh, batch)
        if e.features == "digits":
            real, _ = load_digits("test")
            return features, summarise(features, [real], "digits", total=len(real))
        reference = open_images(e.reference, self.config.data.resolution)
        return features, summarise_reference(features, reference, batch, manifold=False)

    def _encode(self, params: Any, images: Array) -> tuple[Array, Array]:
        pixels = images.astype(jnp.float32) / 127.5 - 1
        moments: Any = self.vae.apply({"params": params}, pixels, method="encode")
        return moments

    def _decode(self, params: Any, latents: Array) -> Array:
        images: Any = self.vae.apply({"params": params}, latents, method="decode")
        return to_uint8(images, self.config.sampling.rounding)

    def picture(self, path: epath.Path, images: np.ndarray) -> np.ndarray:
        """Write a grid of uint8 images as a PNG; return it."""
        picture = grid(images, self.config.run.grid_columns)
        if jax.process_index() == 0:
            factor = max(1, round(MIN_PICTURE / picture.shape[1]))
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            with self.log.trying("pictures"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    Image.fromarray(large).save(file, format="PNG")
        return picture

    def references(self, folder: epath.Path) -> dict[str, float]:
        """Pictures to hold the samples against; what real digits score.

        With the digits' proxy, held-out real images and the same through the VAE; else
        records of the dataset, decoded.
        """
        columns, pictures = self.config.run.grid_columns, self.workdir / "images"
        if self.config.eval.features != "digits":
            records = batches(
                folder,
                split="train",
                batch_size=self.config.run.grid_classes * columns,
                seed=self.config.seed,
                start_step=0,
                streams=1,
                shuffle_buffer=self.config.data.shuffle_buffer,
                process_index=0,
                process_count=1,
            )
            means = next(records)["mean"].astype(np.float32)
            decoded = np.asarray(self.decode(self.vae_params, means))
            self.picture(pictures / "reconstruction.png", decoded)
            return {}
        images, labels = load_digits("test")
        means, _ = self.encode(self.vae_params, images)
        decoded = np.asarray(self.decode(self.vae_params, means))
        rows = [np.flatnonzero(labels == k)[:columns] for k in self.grid_classes()]
        chosen = np.concatenate(rows)
        self.picture(pictures / "real.png", images[chosen])
        self.picture(pictures / "reconstruction.png", decoded[chosen])
        train = load_digits("train")
        return {
            # the training set's distance; the held-out set's is 0 by definition
            "real_frechet": self.metrics([train[0]], train[1])["frechet"],
            "real_accuracy": self.metrics([images], labels)["accuracy"],
            **{
                f"reconstruction_{name}": value
                for name, value in self.metrics([decoded], labels).items()
            },
        }

    def metrics(
        self, images: Iterable[np.ndarray], labels: np.ndarray
    ) -> dict[str, float]:
        """What batches of uint8 images score. UserError where they cannot be scored."""
        assert self.features is not None
        assert self.reference is not None
        summary = summarise(
            self.features, images, "samples", total=len(labels), labels=labels
        )
        return compare(self.features, summary, self.reference)

    def grid_classes(self) -> np.ndarray:
        """The class of each row of a sample grid, spread over all classes."""
        last = self.config.data.num_classes - 1
        return np.linspace(0, last, self.config.run.grid_classes).round().astype(int)

    def _sample_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def sample(self, step: int, params: Any, alive: Alive) -> None:
        """Write samples/step_STEP.png: the same noise and labels at every step."""
        labels = self.grid_classes().repeat(self.config.run.grid_columns)
        parts = between(self.generate(np.arange(len(labels)), labels, params), alive)
        picture = self.picture(self._sample_file(step), np.concatenate([*parts]))
        self.log.image(step, "samples", picture)

    def score(self, step: int, params: Any, alive: Alive) -> dict[str, float]:
        """Metrics of samples, also written to the log; the same noise at every step.

        Samples that cannot be scored (all alike, say) are reported and score nothing:
        training goes on.
        """
        indices = np.arange(self.config.eval.num_samples)
        labels = draw_labels(self.config, indices)
        try:
            images = between(self.generate(indices, labels, params), alive)
            scores = self.metrics(images, labels)
        except UserError as error:
            self.log.message(f"step {step}: not scored: {error}")
            return {}
        self.log.scalars(step, {f"eval/{k}": v for k, v in scores.items()})
        return scores

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether samples, and scores, are asked for at `step`."""
        scoring = self.features is not None and step % self.config.eval.every == 0
        return step % self.config.run.sample_every == 0, scoring

    def observe(
        self, step: int, params: Any, alive: Alive, resumed: bool = False
    ) -> None:
        """What is due at `step`; of a run resumed there, what it had not got to.

        alive: called between batches of samples; what it raises ends them.
        """
        sampling, scoring = self.due(step)
        if sampling and not (resumed and self._sample_file(step).exists()):
            self.sample(step, params, alive)
        if scoring and not (resumed and step in self.log.scores):
            self.score(step, params, alive)

    def finish(
        self, step: int, params: Any, reference: dict[str, float], alive: Alive
    ) -> None:
        """Last samples, results.json (the mark of a finished run) and the report."""
        self.sample(step, params, alive)
        results: dict[str, Any] = {"step": step, "weights": "ema"}
        results |= describe(self.config)
        if self.features is not None:
            results |= {
                "num_samples": self.config.eval.num_samples,
                "metrics": self.score(step, params, alive),
                "reference": reference,
                **self.features.facts,
                "note": NOTES[self.features.kind],
            }
        results["versions"] = versions()
        if jax.process_index() == 0:
            text = json.dumps(results, indent=2) + "\n"
            write_whole(self.workdir / RESULTS, text)
        self.report()

    def report(self) -> None:
        """Write report.html anew."""
        if jax.process_index() == 0:
            with self.log.trying("report.html"):
                write_report(self.workdir)


def between(batches: Iterator[np.ndarray], alive: Alive) -> Iterator[np.ndarray]:
    """The same batches, with a call after each."""
    for batch in batches:
        yield batch
        alive()


def finished(workdir: epath.Path, step: int) -> bool:
    """Whether a run of `step` steps has written its results in `workdir`."""
    try:
        return json.loads((workdir / RESULTS).read_text())["step"] == step
    except (OSError, ValueError, KeyError):
        return False
