"""Table and curves of a study, with the spread of seeds and paired differences."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from sra2_jax.metrics.moments import gaussian
from tools import plots

DRAWS = 200  # of the bootstrap
AXES = {"step": "steps", "seconds": "seconds of training", "flops": "FLOPs of training"}
Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """Rows of scores.jsonl; one that was cut off does not count."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def differences(
    features: dict[str, list[np.ndarray]], baseline: str, held_out: np.ndarray
) -> dict[str, tuple[float, float]]:
    """95% intervals of each method's Fréchet distance less that of `partner`.

    features: method -> (N, D) of each seed's samples. A draw takes seeds and samples,
    with replacement, the same of both methods: they have noise and labels in common.
    """
    draw, distance = np.random.default_rng(0), distance_to(held_out)
    seeds, count = len(features[baseline]), len(features[baseline][0])
    found: dict[str, list[float]] = {name: [] for name in features}
    for _ in range(DRAWS):
        chosen = draw.integers(seeds, size=seeds)
        rows = draw.integers(count, size=count)
        means = {
            name: np.mean([distance(sets[seed][rows]) for seed in chosen])
            for name, sets in features.items()
        }
        for name, mean in means.items():
            found[name].append(float(mean - means[partner(name, baseline, means)]))
    ends = {n: np.quantile(values, (0.025, 0.975)) for n, values in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def distance_to(held_out: np.ndarray) -> Callable[[np.ndarray], float]:
    """`frechet_distance` of features (N, D) to these, thousands of times."""
    mean, cov = gaussian(held_out)
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))

    def distance(x: np.ndarray) -> float:
        m, c = gaussian(x)
        roots = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ c @ root), 0))
        squared = np.square(m - mean).sum()
        return float(squared + np.trace(cov) + np.trace(c) - 2 * roots.sum())

    return distance


def partner(method: str, baseline: str, methods: Collection[str]) -> str:
    """What a method is held against: the baseline with the most of its first changes,
    as "SiT, lognormal" for "SRA 2, lognormal, mean", or the baseline."""
    changes = method.split(", ")[1:]
    for end in range(len(changes), 0, -1):
        changed = ", ".join([baseline, *changes[:end]])
        if changed in methods and changed != method:
            return changed
    return baseline


def table(plan: Any, rows: Rows, step: int, intervals: dict[str, Any]) -> str:
    """Markdown: means at a step over the seeds, and their range."""
    metrics = [k for k in rows[0] if k not in ("step", "seed", "method", "flops")]
    head = ["method", *metrics, f"own fd less {plan.baseline}'s (95%)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows if r["step"] == step):
        own = [r for r in rows if r["method"] == method and r["step"] == step]
        cells = [method]
        for metric in metrics:
            values = np.array([row[metric] for row in own])
            cells.append(
                f"{values.mean():.4g} ({values.min():.4g} to {values.max():.4g})"
            )
        low, high = intervals.get(method, (np.nan, np.nan))
        cells.append("" if method == plan.baseline else f"{low:+.3g} to {high:+.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(plan: Any, out: Path, facts: dict[str, Any], judge: Any) -> None:
    """study.json, study.md and study.png, of the stages that all runs have reached."""
    rows = read(out / "scores.jsonl")
    wanted = len(plan.methods) * plan.seeds
    whole = [s for s in plan.stages if sum(r["step"] == s for r in rows) >= wanted]
    facts = facts | {"levels": judge.levels, "scores": rows}
    (out / "study.json").write_text(json.dumps(facts, indent=1) + "\n")
    if not whole:
        return
    step, own = whole[-1], {}
    for method in plan.methods:
        for sampling in ("", *plan.samplings.get(method, ())):
            files = [
                features(out, method, seed, step, sampling)
                for seed in range(plan.seeds)
            ]
            if all(file.exists() for file in files):
                own[title(method, sampling)] = [np.load(file)["own"] for file in files]
    intervals = differences(own, plan.baseline, judge.held_out["own"])
    rows = [row for row in rows if row["step"] in whole]
    lines = [table(plan, rows, step, intervals), "", "Real images:", ""]
    lines += [f"- {name}: {value:.4g}" for name, value in judge.levels.items()]
    (out / "study.md").write_text("\n".join(lines) + "\n")
    draw(plan, rows, out / "study.png")


def title(method: str, sampling: str) -> str:
    """Of a row: a method, sampled as its config says or otherwise."""
    return f"{method}, {sampling}" if sampling else method


def features(out: Path, method: str, seed: int, step: int, sampling: str = "") -> Path:
    """The file of the features of a run's samples at a step, in the run's folder."""

    def slug(text: str) -> str:
        return "".join(c if c.isalnum() else "_" for c in text.lower())

    file = f"features_{step}{slug(sampling and f' {sampling}')}.npz"
    return out / f"{slug(method)}_{seed}" / file


def draw(plan: Any, rows: Rows, path: Path) -> None:
    """Each metric against steps, seconds and FLOPs: means, and the range of seeds."""
    metrics = [k for k in rows[0] if k not in ("method", "seed", *AXES)]
    with plots.style():
        from matplotlib import pyplot

        size = 4 * len(AXES), 2.6 * len(metrics)
        figure, panels = pyplot.subplots(
            len(metrics), len(AXES), figsize=size, squeeze=False, layout="constrained"
        )
        for i, metric in enumerate(metrics):
            for panel, (axis, title) in zip(panels[i], AXES.items(), strict=True):
                for k, method in enumerate(plan.methods):
                    own = [r for r in rows if r["method"] == method]
                    steps = sorted({r["step"] for r in own})
                    at = [[r for r in own if r["step"] == s] for s in steps]
                    x = [np.mean([r[axis] for r in some]) for some in at]
                    y = [[r[metric] for r in some] for some in at]
                    colour = plots.PALETTE[k % len(plots.PALETTE)]
                    dash = plots.DASHES[k // len(plots.PALETTE) % len(plots.DASHES)]
                    mean = [np.mean(values) for values in y]
                    panel.plot(x, mean, dash, color=colour, label=method)
                    ends = [min(values) for values in y], [max(v) for v in y]
                    panel.fill_between(x, *ends, color=colour, alpha=0.15, lw=0)
                panel.set(xlabel=title, ylabel=metric)
        panels[0, 0].legend()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
