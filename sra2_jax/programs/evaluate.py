"""Score images as ADM does: python -m sra2_jax evaluate SAMPLES --reference=REF.

SAMPLES and REF are .npz files in ADM's format (arr_0, and of a reference mu, sigma,
mu_s, sigma_s), folders of images, tfds:NAME[:SPLIT] or digits. Prints FID, sFID,
Inception Score, Precision and Recall, and writes them as JSON with how the samples
were made. --make_reference=FILE.npz writes the statistics of SAMPLES instead, and
--selftest checks the metrics on this machine. Runs without TensorFlow.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sra2_jax.command import run_program
from sra2_jax.errors import UserError
from sra2_jax.metrics.archive import open_images, open_reference, write_npz
from sra2_jax.metrics.compare import (
    MANIFOLD,
    Summary,
    compare,
    summarise,
    summarise_reference,
    watched,
)
from sra2_jax.metrics.features import KINDS, Features, make_features
from sra2_jax.metrics.selftest import selftest
from sra2_jax.metrics.sets import ImageSet
from sra2_jax.sharding import make_mesh
from sra2_jax.versions import versions

SHOWN = {
    "fid": "FID",
    "frechet": "Fréchet distance, proxy",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "accuracy": "Recognised as asked",
    "precision": "Precision",
    "recall": "Recall",
}


def summary_of(features: Features, images: ImageSet, batch: int, keep: int) -> Summary:
    """One pass over a set of images."""
    return summarise(
        features,
        watched(images, batch),
        images.name,
        total=images.count,
        keep=keep,
        labels=images.labels,
    )


def note_if_few(summary: Summary) -> list[str]:
    """A line where covariances of so few images have not full rank."""
    widths = {kind: mean.size for kind, (mean, _) in summary.gaussians.items()}
    if summary.count is None or summary.count > max(widths.values()):
        return []
    needed = " and ".join(f"{width:,} {kind}" for kind, width in widths.items())
    return [
        f"{summary.name}: {summary.count:,} images give the covariance of {needed} "
        "features no full rank; distances are biased upwards, compare them with none "
        "of other counts"
    ]


def evaluate(
    features: Features,
    samples: ImageSet,
    reference: str,
    out: epath.Path,
    batch: int,
    resolution: int | None,
    split: str,
) -> dict[str, float]:
    """Print the metrics of `samples` and write them to `out` as JSON.

    Raises:
      UserError: unusable samples or reference.
    """
    held = open_reference(reference, resolution, split)
    if held.images is not None and held.images.shape != samples.shape:
        raise UserError(
            f"{samples.name} has images of {samples.shape[0]}x{samples.shape[1]} "
            f"pixels, {reference} of {held.images.shape[0]}x{held.images.shape[1]}: "
            "compare images of one size"
        )
    against = summarise_reference(features, held, batch, manifold=True)
    keep = samples.count if against.kept is not None else 0
    summary = summary_of(features, samples, batch, keep)
    metrics = compare(features, summary, against)
    notes = [*note_if_few(summary), *note_if_few(against)]
    if against.kept is None:
        notes.append(f"{reference}: has no images (arr_0): no Precision and Recall")
    results = {
        "metrics": metrics,
        "num_samples": summary.count,
        "samples": samples.name,
        "reference": reference,
        **features.facts,
        "notes": notes,
        "sampling": samples.settings or "unknown: the samples do not say",
        "versions": versions(),
    }
    fresh = out.parent / f"{out.name}.tmp"
    fresh.write_text(json.dumps(results, indent=2) + "\n")
    fresh.replace(out)
    for name, value in metrics.items():
        print(f"{SHOWN[name]}: {value:.6g}")
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {out}")
    return metrics


def make_reference(
    features: Features, images: ImageSet, out: epath.Path, batch: int
) -> None:
    """Write ADM's reference file of a set: statistics of all, 10,000 of its images.

    Raises:
      UserError: images that have no statistics.
    """
    summary = summary_of(features, images, batch, keep=0)
    for note in note_if_few(summary):
        print(f"note: {note}")
    count = min(MANIFOLD, images.count)
    chosen = np.linspace(0, images.count - 1, count).round().astype(int)
    arrays = {"mu": summary.gaussians["pool"][0], "sigma": summary.gaussians["pool"][1]}
    if "spatial" in summary.gaussians:
        arrays["mu_s"], arrays["sigma_s"] = summary.gaussians["spatial"]
    settings = {
        "source": images.name,
        "count": images.count,
        "kind": features.kind,
        **features.facts,
        "versions": versions(),
    }
    arrays["settings"] = np.array(json.dumps(settings))

    def selected() -> Iterator[np.ndarray]:
        seen = 0
        for part in images.batches(batch):
            rows = chosen[(chosen >= seen) & (chosen < seen + len(part))] - seen
            seen += len(part)
            if len(rows):
                yield part[rows]

    write_npz(out, arrays, images=selected(), shape=(count, *images.shape))
    print(f"{out}: statistics of {images.count:,} images, {count:,} of them inside")


def target(flag: str, text: str, suffix: str) -> epath.Path:
    """The path of a new file. UserError: it exists, or has another suffix."""
    out = epath.Path(text)
    if out.suffix != suffix:
        raise UserError(f"--{flag}={text}: must end in {suffix}")
    if out.exists():
        raise UserError(f"--{flag}={text}: exists already: remove it or use another")
    return out


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name the network of the metrics."""
    parser.add_argument(
        "--features", choices=KINDS, default="inception", help="(%(default)s)"
    )
    parser.add_argument(
        "--inception",
        default="inception.safetensors",
        metavar="FILE",
        help="weights, .pth, .npz or .safetensors (%(default)s)",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help="centre-crop a folder or dataset to this side, as ADM does",
    )
    parser.add_argument(
        "--split", default="train", help="of a dataset that has splits (%(default)s)"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help=".npz, folder, tfds:NAME, digits")
    add("--reference", metavar="REF", help="what to compare them with")
    add("--make_reference", metavar="FILE.npz", help="write statistics of SAMPLES")
    add("--out", metavar="FILE.json", help="results (beside SAMPLES)")
    add("--batch_size", type=int, default=64, help="of the network (%(default)s)")
    add_feature_arguments(parser)
    add("--selftest", action="store_true", help="check the metrics on this machine")
    add("--golden", type=Path, metavar="DIR", help="golden files for --selftest")
    arguments = parser.parse_args()
    wanted = (arguments.selftest, arguments.reference, arguments.make_reference)
    if sum(map(bool, wanted)) != 1:
        parser.error("give one of --reference, --make_reference and --selftest")
    if not arguments.selftest and not arguments.samples:
        parser.error("SAMPLES is missing")
    return arguments


def main() -> int:
    a = parse()
    if a.selftest:
        return selftest(a.golden)
    devices = jax.device_count()
    batch = -(-max(a.batch_size, 1) // devices) * devices
    if a.make_reference:
        out = target("make_reference", a.make_reference, ".npz")
    else:
        beside = Path(a.samples.rstrip("/")).with_suffix(".json")
        out = target("out", a.out or str(beside), ".json")
    samples = open_images(a.samples, a.resolution, a.split)
    mesh = make_mesh(-1, 1, batch_size=devices)
    features: Any = make_features(a.features, a.inception, mesh, batch)
    if a.make_reference:
        make_reference(features, samples, out, batch)
    else:
        evaluate(features, samples, a.reference, out, batch, a.resolution, a.split)
    return 0


if __name__ == "__main__":
    run_program(main)
