"""What the blocks of trained networks know of the clean latent.

Their tokens at given noise levels, the principal components of those as colours
(Figure 2 of SRA 2, arXiv 2601.17830), and the share of the latent that a linear map
reads off them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.data import records
from sra2_jax.data.order import Order
from sra2_jax.data.pipeline import batches
from sra2_jax.errors import UserError
from sra2_jax.generator import to_uint8
from sra2_jax.models import apply
from sra2_jax.models.dit import patchify
from sra2_jax.run import Run
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from sra2_jax.weights import load_vae

SEED = 0  # of the order of the records and of the noise
SHUFFLE = 2048  # records to shuffle among
CHUNK = 32  # images a forward pass
PENALTY = 1e-6  # of the ridge, over the mean variance of a token's components
HELD_OUT = 4  # one image in so many tests the ridge
LEAST = 2  # training tokens a channel
PERCENTILES = (2, 98)  # of a principal component, shown as 0 and 1


@dataclass(frozen=True)
class Images:
    """N records of a latents dataset.

    Attributes:
      raw: mean latents as the VAE gives them, (N, h, w, c) float32; z: the same as
        the networks see them, scaled.
      label, index: class and position in the source, (N,); of images with captions
        the tokens of the first one and of none, (N, 2, L).
      split: where they come from.
    """

    raw: np.ndarray
    z: np.ndarray
    label: np.ndarray
    index: np.ndarray
    split: str

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> "Images":
        """The records at these positions."""
        raw, z = self.raw[rows], self.z[rows]
        return Images(raw, z, self.label[rows], self.index[rows], self.split)

    def choose(self, count: int) -> "Images":
        """The first `count` by turns of the classes: one of each, then a second, ..."""
        label = self.label.tolist()
        nth = [label[:i].count(k) for i, k in enumerate(label)]
        return self.take(np.argsort(nth, kind="stable")[:count])

    def decode(self, source: str) -> np.ndarray:
        """uint8 images (N, H, W, 3) through a VAE, see `load_vae`."""
        vae, params = load_vae(source)
        decode = jax.jit(lambda p, z: apply(vae, p, z, method="decode"))
        return np.asarray(to_uint8(decode(params, self.raw), "truncate"))

    def patches(self, run: "Subject") -> np.ndarray:
        """The scaled latents as the run's network cuts them, (N, T, p * p * c)."""
        return np.asarray(patchify(jnp.asarray(self.z), run.config.model.patch_size))


# (images, t) -> {block: tokens (n, T, D)}, some images at a time
Forward = Callable[[Images, float], Iterator[dict[int, np.ndarray]]]


class Subject:
    """A run to look into, on one device.

    Attributes:
      aligned: the blocks that an alignment trains.

    Raises:
      UserError: no run there.
    """

    def __init__(self, workdir: str, label: str = "") -> None:
        self.run = Run(workdir)
        self.config = self.run.config()
        self.label = label or self.config.name
        self.program = Program(self.config, make_mesh(devices=jax.devices()[:1]))
        alignments = self.program.alignments.values()
        self.aligned = sorted({alignment.depth for alignment in alignments})

    def read_images(self, folder: Any, least: int, most: int) -> Images:
        """Records of a dataset, up to `most`, in a fixed random order.

        Raises:
          UserError: no dataset, or one that does not fit or has fewer than `least`.
        """
        info = records.LatentsInfo.read(folder)
        records.check(info, folder, self.config)
        split = "train" if "train" in info.splits else min(info.splits)
        total = sum(info.splits[split].records)
        if total < least:
            raise UserError(f"{folder}: has {total} records, {least} are asked for")
        # One batch: no record comes twice.
        order = Order(min(most, total), SEED, SHUFFLE, split)
        fields = ("captions",) if self.program.reader else ()
        rows = next(batches(folder, order, fields=fields))
        told = rows["captions"][:, [0, -1]] if fields else rows["label"]
        raw, latents = rows["mean"].astype(np.float32), self.config.latents
        z = latents.scale * (raw - latents.shift)
        return Images(raw, z, told, rows["index"], split)

    def open_blocks(
        self, blocks: Sequence[int], labelled: bool = True
    ) -> tuple[int, Forward]:
        """The newest step, and its EMA network up to each of the 1-based `blocks`.

        The network sees x_t = alpha z + sigma eps and the image's label, or the null
        label (the empty caption) if not `labelled`; eps depends on the image alone, so
        it is the same for every run and t. Block 0 of the result is x_t itself, patch
        by patch. Computed in float32.

        Raises:
          UserError: no checkpoint, or one that cannot be read.
        """
        program, abstract = self.program, self.program.abstract
        transport, network = program.transport, program.network
        ema = {n: abstract.ema[n] for n in ("network", "text") if n in abstract.ema}
        with Checkpoints(self.run) as checkpoints:
            state = checkpoints.restore({"ema": ema, "step": abstract.step})
        trees = {"text": program.text} if "text" in program.frozen else {}
        trees |= state["ema"]
        model = replace(network.model, remat="none")
        network = network.clone(model=model, dtype=jnp.float32, attention="xla")

        @jax.jit
        def tokens(trees: Any, z: Array, y: Array, index: Array, t: Array) -> Any:
            if program.reader:
                y = program.read(trees["text"], y[:, 0 if labelled else 1])
            elif not labelled:
                y = jnp.full_like(y, network.num_classes)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(SEED), index)
            noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
            x_t, _ = transport.interpolate(z, noise, t)
            _, found, _ = apply(network, trees["network"], x_t, t, y, tuple(blocks))
            return found | {0: patchify(x_t, network.model.patch_size)}

        def forward(images: Images, t: float) -> Iterator[dict[int, np.ndarray]]:
            size = min(CHUNK, len(images))
            for start in range(0, len(images), size):
                rows = np.arange(start, start + size)
                part = images.take(rows.clip(max=len(images) - 1))  # of one shape
                index = part.index.astype(np.uint32)
                times = np.full(size, t, np.float32)
                found = jax.device_get(tokens(trees, part.z, part.label, index, times))
                count = min(size, len(images) - start)
                yield {block: x[:count] for block, x in found.items()}

        return int(state["step"]), forward


def default_blocks(depth: int, aligned: set[int]) -> list[int]:
    """Two thirds of the depth, the last block, and the aligned ones."""
    return sorted({-(-2 * depth // 3), depth, *aligned})


def read_images(runs: Sequence[Subject], data: str, least: int, most: int) -> Images:
    """Records that all runs were trained on, or, as held-out images, of `data`.

    Raises UserError: as `Subject.read_images`, or the runs' records differ.
    """
    first, *others = (
        run.read_images(data or run.run.latents(run.config), least, most)
        for run in runs
    )
    for run, images in zip(runs[1:], others, strict=True):
        same = images.z.shape == first.z.shape and (
            np.array_equal(images.index, first.index)
            and np.array_equal(images.label, first.label)
            # another machine's VAE may round the float16 another way
            and np.allclose(images.z, first.z, atol=1e-2)
        )
        if not same:
            raise UserError(
                f"the datasets of {runs[0].run} and {run.run} hold different records: "
                "give --data=FOLDER, one dataset for all"
            )
    return first


def principal_colors(panels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Tokens (N, T, D) to colours (N, T, 3) in [0, 1] by their principal components.

    Fitted on all tokens of all panels together, so that a colour means the same in
    each; every panel first gets mean 0 and mean square 1, or the one with the largest
    activations would decide alone. Each component runs from its 2nd percentile to its
    98th; its sign, which is free, is the one that makes its longer tail bright (third
    moment positive). Components that there are too few numbers for are grey.
    """
    flat = [x.reshape(-1, x.shape[-1]).astype(np.float64) for x in panels]
    flat = [x - x.mean(axis=0) for x in flat]
    x = np.concatenate([x / (np.sqrt(np.mean(x**2)) or 1.0) for x in flat])
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    scores = x @ axes[:3].T
    scores *= np.where(np.sum(scores**3, axis=0) < 0, -1.0, 1.0)
    low, high = np.percentile(scores, PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1.0)
    colors = np.full((len(x), 3), 0.5)
    colors[:, : scores.shape[1]] = np.clip((scores - low) / span, 0, 1)
    parts = np.split(colors, np.cumsum([len(x) for x in flat])[:-1])
    return [c.reshape(*x.shape[:2], 3) for c, x in zip(parts, panels, strict=True)]


def gram(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of products of all columns of [x, 1, y], float64; x (n, d), y (n, e).

    The sum of the Gram matrices of parts is that of the whole.
    """
    columns = np.concatenate([x, np.ones((len(x), 1)), y], axis=1, dtype=np.float64)
    return columns.T @ columns


def ridge_r2(train: np.ndarray, test: np.ndarray, d: int) -> float:
    """R^2 on test rows of the ridge regression of y on x fitted on training rows.

    y ~ x w + b, minimising sum |y - x w - b|^2 + penalty |w|^2 with
    penalty = PENALTY * trace(Xc^T Xc) / d, Xc the centred x. R^2 = 1 - SS_res / SS_tot,
    both summed over all rows and columns, SS_tot around the test rows' own mean.

    Args:
      train, test: Gram matrices of `gram`; d: columns of x.
    """
    count, sums = train[d, d], train[d]
    centred = train - np.outer(sums, sums) / count
    xx, xy = centred[:d, :d], centred[:d, d + 1 :]
    penalty = PENALTY * np.trace(xx) / d
    w = np.linalg.solve(xx + penalty * np.eye(d), xy)
    b = (sums[d + 1 :] - sums[:d] @ w) / count
    residuals = np.concatenate([-w, -b[None], np.eye(len(b))])  # of [x, 1, y]
    left = np.sum(residuals * (test @ residuals))
    total = (
        np.trace(test[d + 1 :, d + 1 :]) - np.sum(test[d, d + 1 :] ** 2) / test[d, d]
    )
    return float(1 - left / total)


def predictability(
    run: Subject, images: Images, times: Sequence[float], labelled: bool = True
) -> tuple[int, np.ndarray]:
    """The run's step and R^2 (len(times), depth + 1) of the clean latent's patches.

    Column k is block k's tokens, column 0 those of x_t itself. Every HELD_OUT-th image
    tests what the others fit.

    Raises:
      UserError: as `Subject.open_blocks`, or too few images for a token's width.
    """
    model = run.config.model
    targets = images.patches(run)
    _, count, size = targets.shape
    testing = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    least = -(-LEAST * model.width * HELD_OUT // (count * (HELD_OUT - 1)))
    if len(images) < max(least, HELD_OUT):
        raise UserError(
            f"{len(images)} records are too few for the {model.width} channels of "
            f"{run.run}: --records={max(least, HELD_OUT)} at least"
        )
    blocks = range(model.depth + 1)
    step, forward = run.open_blocks(blocks[1:], labelled)
    table = np.empty((len(times), len(blocks)))
    for row, t in zip(table, times, strict=True):
        sums: dict[tuple[int, bool], Any] = {}
        start = 0
        for part in forward(images, t):
            chosen = slice(start, start + len(part[0]))
            start = chosen.stop
            for block, test in itertools.product(blocks, (False, True)):
                rows = testing[chosen] == test
                x, y = part[block][rows], targets[chosen][rows]
                more = gram(x.reshape(-1, x.shape[-1]), y.reshape(-1, size))
                sums[block, test] = sums.get((block, test), 0.0) + more
        for k in blocks:
            d = len(sums[k, False]) - 1 - size
            row[k] = ridge_r2(sums[k, False], sums[k, True], d)
    return step, table
