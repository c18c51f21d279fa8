"""What a person sees of a run while it trains: pictures, proxy metrics, the report."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from PIL import Image

from sra2_jax.data.pipeline import batches
from sra2_jax.evaluation.generate import grid, make_generate, to_uint8
from sra2_jax.evaluation.report import write_report
from sra2_jax.pretrained import load_vae
from sra2_jax.training.log import Log
from sra2_jax.training.sharding import replicated

# Pictures smaller than this are enlarged, so that a viewer shows them at a usable size.
MIN_PICTURE = 640
RESULTS = "results.json"


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
        self.generate = make_generate(config, mesh, self.vae, self.vae_params)
        self.encode = jax.jit(self._encode)
        self.decode = jax.jit(self._decode)
        self.proxy = None
        if config.eval.proxy == "digits":
            from sra2_jax.evaluation.proxy import DigitsProxy  # scikit-learn

            self.proxy = DigitsProxy()

    def _encode(self, params: Any, images: Array) -> tuple[Array, Array]:
        pixels = images.astype(jnp.float32) / 127.5 - 1
        moments: Any = self.vae.apply({"params": params}, pixels, method="encode")
        return moments

    def _decode(self, params: Any, latents: Array) -> Array:
        images: Any = self.vae.apply({"params": params}, latents, method="decode")
        return to_uint8(images, self.config.sampling.rounding)

    def picture(self, name: str, images: np.ndarray) -> np.ndarray:
        """Write a grid of uint8 images as WORKDIR/name.png; return it."""
        picture = grid(images, self.config.run.grid_columns)
        if jax.process_index() == 0:
            path = self.workdir / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            factor = max(1, round(MIN_PICTURE / picture.shape[1]))
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            with path.open("wb") as file:
                Image.fromarray(large).save(file, format="PNG")
        return picture

    def references(self, folder: epath.Path) -> dict[str, float]:
        """Pictures to hold the samples against; the proxy's scores of real images.

        With a proxy, held-out real images and the same through the VAE; else records
        of the dataset, decoded.
        """
        columns = self.config.run.grid_columns
        if self.proxy is None:
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
            self.picture("images/reconstruction", decoded)
            return {}
        images, labels = self.proxy.test
        means, _ = self.encode(self.vae_params, images)
        decoded = np.asarray(self.decode(self.vae_params, means))
        rows = [np.flatnonzero(labels == k)[:columns] for k in self.grid_classes()]
        chosen = np.concatenate(rows)
        self.picture("images/real", images[chosen])
        self.picture("images/reconstruction", decoded[chosen])
        return self.proxy.reference(decoded)

    def grid_classes(self) -> np.ndarray:
        """The class of each row of a sample grid, spread over all classes."""
        last = self.config.data.num_classes - 1
        return np.linspace(0, last, self.config.run.grid_classes).round().astype(int)

    def sample(self, step: int, params: Any) -> None:
        """Write samples/step_STEP.png: the same noise and labels at every step."""
        labels = self.grid_classes().repeat(self.config.run.grid_columns)
        images = self.generate(params, np.arange(len(labels)), labels)
        picture = self.picture(f"samples/step_{step:08d}", images)
        self.log.image(step, "samples", picture)

    def score(self, step: int, params: Any) -> dict[str, float]:
        """Proxy metrics of balanced samples, also written to the log."""
        assert self.proxy is not None
        count = self.config.eval.num_samples
        labels = np.arange(count) % self.config.data.num_classes
        scores = self.proxy.score(
            self.generate(params, np.arange(count), labels), labels
        )
        self.log.scalars(step, {f"eval/{k}": v for k, v in scores.items()})
        return scores

    def finish(self, step: int, params: Any, reference: dict[str, float]) -> None:
        """Last samples, results.json (the mark of a finished run) and the report."""
        self.sample(step, params)
        results: dict[str, Any] = {
            "step": step,
            "weights": "ema",
            "vae": self.config.vae,
            "seed": self.config.seed,
            **self.config.sampling,
        }
        if self.proxy is not None:
            from sra2_jax.evaluation.proxy import NOTE, SPACE

            results |= {
                "num_samples": self.config.eval.num_samples,
                "labels": "balanced",
                "metrics": self.score(step, params),
                "reference": reference,
                "space": SPACE,
                "note": NOTE,
            }
        if jax.process_index() == 0:
            path = self.workdir / RESULTS
            path.write_text(json.dumps(results, indent=2) + "\n")
        self.report()

    def report(self) -> None:
        """Write report.html anew."""
        if jax.process_index() == 0:
            write_report(self.workdir)


def finished(workdir: epath.Path, step: int) -> bool:
    """Whether a run of `step` steps has written its results in `workdir`."""
    try:
        return json.loads((workdir / RESULTS).read_text())["step"] == step
    except (OSError, ValueError, KeyError):
        return False
