"""Sets of images, summarised by their features in one pass, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sra2_jax.errors import UserError
from sra2_jax.metrics.archive import Reference
from sra2_jax.metrics.features import Features
from sra2_jax.metrics.moments import InceptionScore, Moments, frechet_distance
from sra2_jax.metrics.neighbours import precision_recall
from sra2_jax.metrics.sets import ImageSet

Gaussian = tuple[np.ndarray, np.ndarray]
MANIFOLD = 10_000  # reference images whose features precision and recall use, as ADM


@dataclass(frozen=True)
class Summary:
    """What the metrics need to know of a set of images.

    Attributes:
      name: the set, for messages.
      count: its images; None where a reference file does not say.
      gaussians: "pool" and perhaps "spatial" -> mean (D,), covariance (D, D).
      kept: pool features (n, D) of images for precision and recall, or None.
      inception_score, accuracy: None where the network gives no such thing.
    """

    name: str
    count: int | None
    gaussians: dict[str, Gaussian]
    kept: np.ndarray | None = None
    inception_score: float | None = None
    accuracy: float | None = None


def summarise(
    features: Features,
    batches: Iterable[np.ndarray],
    name: str,
    *,
    total: int,
    keep: int = 0,
    labels: np.ndarray | None = None,
) -> Summary:
    """Run a network over batches of uint8 images, `total` in all.

    Args:
      keep: how many images' pool features to keep, evenly spaced.
      labels: (total,) what a network that recognises classes should find.

    Raises:
      UserError: too few images, features that are not finite or all the same.
    """
    moments: dict[str, Moments] = {}
    score, correct, seen = InceptionScore(), 0, 0
    chosen = np.zeros(total, bool)
    chosen[np.linspace(0, total - 1, min(keep, total)).round().astype(int)] = True
    kept = []
    for images in batches:
        outputs = features(images)
        rows = slice(seen, seen + len(images))
        for kind in ("pool", "spatial"):
            if kind in outputs:
                moments.setdefault(kind, Moments(name)).add(outputs[kind])
        if "probabilities" in outputs:
            score.add(outputs["probabilities"])
        if "predicted" in outputs and labels is not None:
            correct += int(np.sum(outputs["predicted"] == labels[rows]))
        if keep:
            kept.append(outputs["pool"][chosen[rows]])
        seen += len(images)
    if not moments:
        raise UserError(f"{name}: no images")
    recognises = labels is not None and "predicted" in outputs
    return Summary(
        name,
        seen,
        {kind: (m.mean, m.cov()) for kind, m in moments.items()},
        np.concatenate(kept) if keep else None,
        score.value() if "probabilities" in outputs else None,
        correct / seen if recognises else None,
    )


def watched(images: ImageSet, batch: int) -> Iterator[np.ndarray]:
    """The batches of a set, with a progress bar."""
    bar = tqdm(
        total=images.count,
        unit="image",
        desc=Path(images.name).name,
        disable=jax.process_index() > 0,
    )
    with bar:
        for part in images.batches(batch):
            yield part
            bar.update(len(part))


def summarise_reference(
    features: Features, reference: Reference, batch: int, manifold: bool
) -> Summary:
    """The reference's own statistics where it brings them, else those of its images.

    manifold: also run the network over its images (at most MANIFOLD of them, evenly
    spaced, where they are many) for precision and recall, if it has images.

    Raises:
      UserError: statistics of other features than `features` gives, or unusable images.
    """
    made_with = (reference.settings or {}).get("kind", "inception")
    images = reference.images
    if reference.mu is None:
        assert images is not None  # open_reference sees to it
        return summarise(
            features,
            watched(images, batch),
            reference.name,
            total=images.count,
            keep=MANIFOLD if manifold else 0,
        )
    if made_with != features.kind:
        raise UserError(
            f"{reference.name}: its statistics are of {made_with} features, not "
            f"{features.kind}: give --features={made_with} or another reference"
        )
    assert reference.sigma is not None  # nor is there one without the other
    gaussians = {"pool": (reference.mu, reference.sigma)}
    if reference.mu_s is not None and reference.sigma_s is not None:
        gaussians["spatial"] = reference.mu_s, reference.sigma_s
    kept = None
    if manifold and images is not None:
        kept = summarise(
            features,
            watched(images, batch),
            reference.name,
            total=images.count,
            keep=MANIFOLD,
        ).kept
    return Summary(reference.name, None, gaussians, kept)


def compare(
    features: Features, samples: Summary, reference: Summary
) -> dict[str, float]:
    """The metrics that both summaries allow, in the order papers print them.

    "fid" ("frechet" of other features), "sfid", "inception_score", "accuracy",
    "precision", "recall".

    Raises:
      UserError: statistics that cannot be compared.
    """
    names = {"pool": features.distance, "spatial": "sfid"}
    metrics = {}
    try:
        for kind in samples.gaussians.keys() & reference.gaussians.keys():
            metrics[names[kind]] = frechet_distance(
                *samples.gaussians[kind], *reference.gaussians[kind]
            )
        if samples.kept is not None and reference.kept is not None:
            precision, recall = precision_recall(reference.kept, samples.kept)
            metrics |= {"precision": precision, "recall": recall}
    except UserError as error:
        raise UserError(f"{samples.name} against {reference.name}: {error}") from error
    if samples.inception_score is not None:
        metrics["inception_score"] = samples.inception_score
    if samples.accuracy is not None:
        metrics["accuracy"] = samples.accuracy
    order = (features.distance, "sfid", "inception_score", "accuracy", "precision")
    return {k: metrics[k] for k in (*order, "recall") if k in metrics}
