"""Score images as ADM does: python -m sra2_jax evaluate SAMPLES --reference=REF.

SAMPLES and REF are .npz files in ADM's format (arr_0, and of a reference mu, sigma,
mu_s, sigma_s), folders of images, tfds:NAME[:SPLIT] or digits. Prints FID, sFID,
Inception Score, Precision and Recall, and writes them as JSON with how the samples
were made. --make_reference=FILE.npz writes the statistics of SAMPLES instead. Runs
without TensorFlow.
"""

import argparse
import json
from collections.abc import Iterator

import numpy as np
from etils import epath

from sra2_jax.command import Parser
from sra2_jax.config import Eval
from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS, compare
from sra2_jax.metrics.features import KINDS, Features, make_features
from sra2_jax.metrics.sets import STATISTICS, ImageSet, open_images, write_npz
from sra2_jax.runtime import versions
from sra2_jax.sharding import make_mesh, rounded
from sra2_jax.storage import new_file, write_json


def note_if_few(summary: compare.Summary) -> list[str]:
    """A line where covariances of so few images have not full rank."""
    width = max(mean.size for mean, _ in summary.gaussians.values())
    if summary.count is None or summary.count > width:
        return []
    return [
        f"{summary.name}: {summary.count:,} images give the covariance of {width:,} "
        "features no full rank; distances are biased upwards, compare them with none "
        "of other counts"
    ]


def evaluate(
    features: Features,
    samples: ImageSet,
    reference: ImageSet,
    out: epath.Path,
    batch: int,
) -> None:
    """Print the metrics of `samples` and write them to `out` as JSON.

    Raises UserError: unusable samples or reference.
    """
    if len(reference) and reference.shape[1:] != samples.shape[1:]:
        raise UserError(
            f"{samples.name} has images {samples.shape}, {reference.name} "
            f"{reference.shape}: compare images of one size"
        )
    against = compare.summarise_reference(features, reference, batch)
    keep = len(samples) if against.kept is not None else 0
    summary = compare.summarise(features, samples, batch, keep)
    metrics = compare.compare(features, summary, against)
    notes = [*note_if_few(summary), *note_if_few(against)]
    if against.kept is None:
        notes.append(
            f"{reference.name}: has no images (arr_0): no kernel distance, "
            "Precision and Recall"
        )
    results = {
        "metrics": metrics,
        "num_samples": summary.count,
        "samples": samples.name,
        "reference": reference.name,
        **features.facts,
        "notes": notes,
        "sampling": samples.settings or "unknown: the samples do not say",
        "versions": versions(),
    }
    write_json(out, results)
    lines = [f"{METRICS[name][0]}: {value:.6g}" for name, value in metrics.items()]
    lines += [f"note: {note}" for note in notes]
    print("\n".join([*lines, f"wrote {out}"]))


def make_reference(
    features: Features, images: ImageSet, out: epath.Path, batch: int
) -> None:
    """Write ADM's reference file of a set: statistics of all, 10,000 of its images.

    Raises UserError: images that have no statistics.
    """
    summary, total = compare.summarise(features, images, batch), len(images)
    for note in note_if_few(summary):
        print(f"note: {note}")
    chosen = compare.evenly(total, compare.MANIFOLD)
    arrays: dict[str, np.ndarray] = {}
    for kind, gaussian in summary.gaussians.items():
        arrays |= dict(zip(STATISTICS[kind], gaussian, strict=True))
    settings = {"source": images.name, "count": total, "kind": features.kind}
    settings |= {**features.facts, "versions": versions()}
    arrays["settings"] = np.array(json.dumps(settings))

    def selected() -> Iterator[np.ndarray]:
        seen = 0
        for part in images.batches(batch):
            yield part[np.isin(seen + np.arange(len(part)), chosen)]
            seen += len(part)

    write_npz(out, arrays, selected(), (len(chosen), *images.shape[1:]))
    print(f"{out}: statistics of {total:,} images, {len(chosen):,} of them inside")


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name the network of the metrics, and how images are read."""
    add = parser.add_argument
    add("--features", choices=KINDS, default="inception", help="(%(default)s)")
    for kind in ("inception", "dinov2"):
        default, which = getattr(Eval, kind), f"weights of {kind} (%(default)s)"
        add(f"--{kind}", default=default, metavar="WEIGHTS", help=which)
    crop = "centre-crop a folder or dataset to this side, as ADM does"
    add("--resolution", type=int, help=crop)
    add("--split", default="train", help="of a dataset with splits (%(default)s)")


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help=".npz, folder, tfds:NAME, digits")
    add("--reference", metavar="REF", help="what to compare them with")
    add("--make_reference", metavar="FILE.npz", help="write statistics of SAMPLES")
    add("--out", metavar="FILE.json", help="results (beside SAMPLES)")
    add("--batch_size", type=int, default=64, help="of the network (%(default)s)")
    add_feature_arguments(parser)
    a = parser.parse_args()
    if bool(a.reference) == bool(a.make_reference):
        parser.error("give one of --reference and --make_reference")
    if a.make_reference:
        out = new_file(a.make_reference, ".npz")
    else:
        beside = a.samples.rstrip("/").removesuffix(".npz") + ".json"
        out = new_file(a.out or beside, ".json")
    samples = open_images(a.samples, a.resolution, a.split)
    if not len(samples):
        raise UserError(f"{a.samples}: has statistics alone: give a set with images")
    mesh = make_mesh()
    batch = rounded(max(a.batch_size, 1), mesh.size)
    features = make_features(a.features, vars(a).get(a.features, ""), mesh, batch)
    if a.make_reference:
        make_reference(features, samples, out, batch)
    else:
        reference = open_images(a.reference, a.resolution, a.split)
        evaluate(features, samples, reference, out, batch)
