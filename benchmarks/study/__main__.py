"""Train methods side by side, over seeds, and say what differs.

    python -m benchmarks.study PLAN --data=DATA --out=DIR --budget=540 [--seed=N]

PLAN is one of benchmarks/study/plans, or a Python file like those. Every stage trains
each method and seed to the same step, in turn, and scores samples of its average, so
that all have equal progress, but for one stage, whenever it ends. It ends by itself
within --budget seconds; the same command goes on. One process for each seed fills a GPU
that one alone does not. DIR gets scores.jsonl, study.json, study.md (the table) and
study.png (the curves).
"""

import json
import runpy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np

from benchmarks.study import report
from benchmarks.study.judge import Judge
from benchmarks.study.methods import HEADS, Keys
from sra2_jax import config_file
from sra2_jax.alignment import ALIGNMENTS
from sra2_jax.command import Parser, run_program
from sra2_jax.config import Config
from sra2_jax.errors import UserError, explained
from sra2_jax.generator import draw_labels, open_run
from sra2_jax.run import Run
from sra2_jax.runtime import versions
from sra2_jax.train import train

PLANS = Path(__file__).parent / "plans"
# A run of the study leaves out what the study does itself.
QUIET = {
    "eval.features": "", "run.sample_every": 10**9, "run.checkpoint_every": 10**9,
    "run.keep_checkpoints": 1, "run.keep_best": 0, "run.grid_columns": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a plan's file says, in names of these.

    config: file of the config; keys: changes of it in all runs; methods: name ->
    changes of it; samplings: method -> name -> changes of how it is sampled, scored at
    the last stage besides; baseline: the method that the others are held against;
    stages: steps at which all are scored; seeds; samples: scored each time. In texts
    {data} stands for --data.
    """

    config: str
    keys: Keys
    methods: dict[str, Keys]
    samplings: dict[str, dict[str, Keys]]
    baseline: str
    stages: tuple[int, ...]
    seeds: int
    samples: int

    @classmethod
    def read(cls, name: str, data: Path) -> Self:
        """Raises UserError: no such plan, or a name that is missing."""
        path = Path(name) if name.endswith(".py") else PLANS / f"{name}.py"
        with explained(f"{path}: no plan", f"give a file, or one of {PLANS}"):
            found = runpy.run_path(str(path))
            plan = cls(**{f.name: found[f.name] for f in fields(cls)})
        filled = json.loads(json.dumps(vars(plan)).replace("{data}", str(data)))
        return cls(**filled)

    def settings(self, method: str, seed: int, steps: int) -> Config:
        """The config of a run up to a stage."""
        changes = QUIET | self.keys | self.methods[method]
        changes |= {"seed": seed, "steps": steps, "name": "study"}
        changes.pop("head", None)
        return config_file.load(self.config).override(changes)

    def heads(self, method: str) -> Any:
        """A context in which SRA 2 has the method's head."""
        own = self.methods[method].get("head")
        return patch.dict(ALIGNMENTS, {"vae": HEADS[own]} if own else {})

    def runs(self, seeds: Iterable[int]) -> Iterator[tuple[int, int, str, str]]:
        """(step, seed, method, sampling or nothing), in the order of work."""
        for step in self.stages:
            for seed in seeds:
                for method in self.methods:
                    yield step, seed, method, ""
        for seed in seeds:
            for method, samplings in self.samplings.items():
                for sampling in samplings:
                    yield self.stages[-1], seed, method, sampling


def score(file: Path, judge: Judge, samples: int, keys: Keys) -> dict[str, Any]:
    """What a run's samples score and its cost so far.

    file: for their features, in the run's folder; keys: changes of its sampling.
    """
    workdir = file.parent
    config = Run(workdir).config().override(keys)
    generate = open_run(str(workdir), config)
    indices = np.arange(samples)
    labels = draw_labels(config, indices)
    found, features = judge(generate(indices, labels), labels)
    arrays: dict[str, Any] = dict(features)
    np.savez(file, **arrays)
    rates = [row["images_per_second"] for row in Run(workdir).rows() if "loss" in row]
    seconds = config.steps * config.batch_size / float(np.median(rates))
    flops = generate.program.flops() * config.steps
    return found | {"seconds": seconds, "flops": flops}


def study(
    plan: Plan, judge: Judge, out: Path, budget: float, seeds: Iterable[int]
) -> bool:
    """Train and score what is missing of these seeds; whether all of it is there."""
    path, began, longest = out / "scores.jsonl", time.monotonic(), 0.0
    done = {(r["step"], r["seed"], r["method"]) for r in report.read(path)}
    for step, seed, method, sampling in plan.runs(seeds):
        title = report.title(method, sampling)
        if (step, seed, title) in done:
            continue
        start = time.monotonic()
        if start - began + 1.2 * longest > budget:
            return False
        config = plan.settings(method, seed, step)
        workdir = report.features(out, method, seed, step).parent
        row = {"step": step, "seed": seed, "method": title}
        changes = plan.samplings[method][sampling] if sampling else {}
        file = report.features(out, method, seed, step, sampling)
        with plan.heads(method):
            if not Run(workdir).finished(step):
                train(config, str(workdir))
            row |= score(file, judge, plan.samples, changes)
        with path.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        longest = max(longest, time.monotonic() - start)
    return True


def main() -> None:
    parser = Parser(prog="benchmarks.study", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    names = ", ".join(sorted(path.stem for path in PLANS.glob("[a-z]*.py")))
    add("plan", metavar="PLAN", help=f"{names}, or a file")
    add("--data", type=Path, required=True, help="folder that the plan reads")
    add("--out", type=Path, required=True, metavar="DIR", help="to work in")
    add("--budget", type=float, default=1e9, help="seconds, then it stops")
    add("--seed", type=int, help="this one alone, others in processes beside it")
    add("--inception", help="weights, for FID and KID besides")
    add("--dinov2", help="weights, for FD-DINOv2 besides")
    a = parser.parse_args()
    began = time.monotonic()
    plan = Plan.read(a.plan, a.data.absolute())
    for method in plan.methods:  # mistakes are found before the work
        config = plan.settings(method, 0, plan.stages[-1])
        config_file.check_paths(config, str(a.out))
    a.out.mkdir(parents=True, exist_ok=True)
    kept, facts = a.out / "study.json", {"plan": json.loads(json.dumps(vars(plan)))}
    if kept.exists() and json.loads(kept.read_text())["plan"] != facts["plan"]:
        raise UserError(f"{a.out}: is of another plan: use another --out")
    more = {"inception": a.inception, "dinov2": a.dinov2}
    judge = Judge(a.data, config.data.resolution, {k: v for k, v in more.items() if v})
    facts["versions"] = versions()
    kept.write_text(json.dumps(facts, indent=1) + "\n")
    seeds = range(plan.seeds) if a.seed is None else [a.seed]
    whole = study(plan, judge, a.out, a.budget - (time.monotonic() - began), seeds)
    report.write(plan, a.out, facts, judge)
    print(f"{a.out}: {'finished' if whole else 'the same command goes on'}")


if __name__ == "__main__":
    run_program(main)
