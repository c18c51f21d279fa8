"""Sets of images, summarised by their features in one pass, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS, moments
from sra2_jax.metrics.features import Features
from sra2_jax.metrics.sets import ImageSet

MANIFOLD = 10_000  # reference images whose features precision and recall use, as ADM


@dataclass(frozen=True)
class Summary:
    """What the metrics need to know of a set of images; None: not known."""

    name: str  # for messages
    count: int | None
    gaussians: dict[str, moments.Gaussian]  # of "pool" and perhaps "spatial" features
    kept: np.ndarray | None = None  # pool features (n, D), for all but Gaussians
    inception_score: float | None = None
    accuracy: float | None = None


def evenly(total: int, count: int) -> np.ndarray:
    """At most `count` of the indices below `total`, evenly spaced."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def summarise(
    features: Features, images: ImageSet, batch: int, keep: int = 0, bar: bool = True
) -> Summary:
    """Run a network over a set, `batch` images at a time, with a progress bar or not.

    keep: how many images' pool features to keep, evenly spaced.

    Raises UserError: too few images, features that are not finite or all the same.
    """
    sums: dict[str, moments.Moments] = {}
    score, seen, kept, predicted = moments.InceptionScore(), 0, [], []
    chosen = evenly(len(images), keep)
    for part in watched(images.batches(batch), len(images), images.name, bar):
        outputs = features(part)
        for kind in outputs.keys() & {"pool", "spatial"}:
            sums.setdefault(kind, moments.Moments(images.name)).add(outputs[kind])
        if "probabilities" in outputs:
            score.add(outputs["probabilities"])
        if "predicted" in outputs and images.labels is not None:
            predicted.append(outputs["predicted"])
        if keep:
            kept.append(outputs["pool"][np.isin(seen + np.arange(len(part)), chosen)])
        seen += len(part)
    return Summary(
        images.name,
        seen,
        {kind: (m.mean, m.cov()) for kind, m in sums.items()},
        np.concatenate(kept) if keep else None,
        score.value() if "probabilities" in outputs else None,
        float(np.mean(np.concatenate(predicted) == images.labels))
        if predicted
        else None,
    )


def watched(
    batches: Iterable[np.ndarray], total: int, name: str, bar: bool = True
) -> Iterator[np.ndarray]:
    """The same batches, with a progress bar."""
    hidden, name = not bar or jax.process_index() > 0, Path(name).name
    with tqdm(total=total, unit="image", desc=name, disable=hidden) as progress:
        for part in batches:
            progress.update(len(part))
            yield part


def summarise_reference(features: Features, reference: ImageSet, batch: int) -> Summary:
    """The reference's own statistics where it brings them, else those of its images;
    and of its images, if it has any, the features of at most MANIFOLD, evenly spaced,
    for precision, recall and the kernel distance.

    Raises UserError: statistics of other features than `features` gives, or unusable
    images.
    """
    made_with = (reference.settings or {}).get("kind", "inception")
    if reference.gaussians and made_with != features.kind:
        raise UserError(
            f"{reference.name}: its statistics are of {made_with} features, not "
            f"{features.kind}: give --features={made_with} or another reference"
        )
    own = Summary(reference.name, None, reference.gaussians)
    if own.gaussians and not len(reference):
        return own
    found = summarise(features, reference, batch, MANIFOLD)
    return replace(own, kept=found.kept) if own.gaussians else found


def compare(
    features: Features, samples: Summary, reference: Summary, neighbours: bool = True
) -> dict[str, float]:
    """Those of METRICS that both allow, in its order; precision and recall only with
    `neighbours`: they take long. UserError: they differ."""
    found: dict[str, float | None] = {
        "inception_score": samples.inception_score,
        "accuracy": samples.accuracy,
    }
    ours, theirs = samples.gaussians, reference.gaussians
    for kind, name in (("pool", features.distance), ("spatial", "sfid")):
        if kind in ours and kind in theirs:
            found[name] = moments.frechet_distance(*ours[kind], *theirs[kind])
    if samples.kept is not None and reference.kept is not None:
        if neighbours:
            precision, recall = moments.precision_recall(reference.kept, samples.kept)
            found |= {"precision": precision, "recall": recall}
        found["kernel_distance"] = moments.kernel_distance(reference.kept, samples.kept)
    ordered = ((name, found.get(name)) for name in METRICS)
    return {name: value for name, value in ordered if value is not None}
