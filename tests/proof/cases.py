"""The cases: (name, function that makes the text that is hashed)."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from tests.proof import adapter

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "fixture_run"
QUICKSTART = "PROOF_QUICKSTART"  # variable: a finished run, to save the minutes
Cases = Iterator[tuple[str, Callable[[], str]]]

MESHES = {"1": (1, 1, 1), "fsdp8": (1, 8, 1), "2x2x2": (2, 2, 2)}
# a small network in bfloat16, with a loop over blocks that keeps products
TINY = {
    "batch_size": 16,
    "data.resolution": 64,
    "data.num_classes": 10,
    "vae": "digits",
    "latents.size": 8,
    "model.width": 32,
    "model.depth": 4,
    "model.heads": 2,
    "align.vae.depth": 2,
    "align.encoder.depth": 2,
    "align.encoder.model": "digits",
    "align.encoder.width": 64,
    "align.encoder.head_width": 48,
    "align.teacher.depth": 1,
    "align.teacher.teacher_depth": 3,
    "sampling.batch_size": 8,
    "sampling.steps": 5,
}
METHODS = {
    "sit": (),
    "vae": ("vae",),
    "encoder": ("encoder",),
    "teacher": ("teacher",),
    "encoder+vae": ("encoder", "vae"),
    "all": ("vae", "encoder", "teacher"),
}
ALL = {f"align.{name}.enabled": True for name in METHODS["all"]}
# each one by itself
OPTIONS = [
    {"accumulate": 2},
    {"model.scan": False},
    *({"model.remat": name} for name in ("none", "attention", "full")),
    {"model.scan": False, "model.remat": "full"},
    {"model.learn_sigma": True},
    {"model.patch_size": 1},
    {"model.mlp_ratio": 3.0},
    {"model.time_scale": 1000.0},
    {"model.dtype": "float32"},
    {"label_dropout": 0.3},
    {"latents.shift_factor": 0.1},
    {"seed": 5},
    {"ema_decay": 0.9},
    *({"transport.path": name} for name in ("gvp", "vp")),
    *({"transport.prediction": name} for name in ("noise", "data")),
    *(
        {"transport.path": path, "transport.prediction": what}
        for path, what in itertools.product(("gvp", "vp"), ("noise", "data"))
    ),
    {"transport.time": "lognormal"},
    {"transport.time": "lognormal", "transport.path": "vp", "transport.time_std": 0.5},
    {"optim.warmup_steps": 1},
    {"optim.warmup_steps": 10},
    {"optim.weight_decay": 0.1},
    {"optim.clip_norm": 0.5},
    {"optim.b1": 0.8, "optim.b2": 0.99, "optim.eps": 1e-6},
    {"align.vae.target": "mean"},
    {"align.encoder.enabled": True, "align.encoder.source": "features"},
    {"align.teacher.enabled": True, "align.teacher.interval": 0.5},
    *(
        {f"align.{name}.enabled": True, f"align.{name}.{key}": value}
        for name, (key, value) in itertools.product(
            METHODS["all"],
            [
                *(("loss", x) for x in ("smooth_l1", "l1", "l2", "cosine")),
                *(
                    ("schedule", x)
                    for x in ("constant", "linear", "cosine", "exponential")
                ),
                ("weight", 0.3),
                ("schedule_start", 7),
                ("schedule_steps", 9),
                ("beta", 0.1),
                ("zscore", True),
                ("t_min", 0.2),
                ("t_max", 0.8),
                ("head_layers", 1),
                ("head_width", 40),
                ("head_final_layer", True),
            ],
        )
    ),
]


def said(changes: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in changes.items())


def plain(text: str) -> str:
    """StableHLO without names that come from Python."""
    text = re.sub(r"^module @\S+", "module @m", text, count=1)
    text = re.sub(r' ?jax\.result_info = "[^"]*",? ?', "", text)
    text = re.sub(r"(tensor<[^>]*>) \{\}", r"\1", text)
    text = re.sub(r"^#loc.*\n| loc\([^)]*\)", "", text, flags=re.MULTILINE)
    own = set(re.findall(r"func\.func (?:\w+ )?@([\w.$-]+)", text))
    new: dict[str, str] = {}

    def rename(match: re.Match) -> str:
        if match[1] not in own:
            return match[0]
        return "@" + new.setdefault(match[1], f"f{len(new)}")

    return re.sub(r"@([\w.$-]+)", rename, text)


def step() -> Cases:
    def case(config: str, changes: dict, mesh: tuple, lower: Callable) -> str:
        return plain(lower(config, changes, mesh))

    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    names = [name for name in names if name not in ("default", "__init__")]
    for name, (shape, mesh) in itertools.product(names, MESHES.items()):
        yield f"{name}/{shape}", partial(case, name, {}, mesh, adapter.lower_step)
    for name in names:
        leaves = partial(adapter.placed_leaves, name, {}, MESHES["2x2x2"])
        yield f"{name}/state", lambda leaves=leaves: "\n".join(leaves())
    for method, on in METHODS.items():
        switch = {f"align.{n}.enabled": n in on for n in METHODS["all"]}
        for shape, mesh in MESHES.items():
            lower = adapter.lower_step
            yield (
                f"tiny/{method}/{shape}",
                partial(case, "sra2_s", TINY | switch, mesh, lower),
            )
            more = TINY | switch | {"accumulate": 2}
            yield (
                f"tiny/{method}/{shape}/accumulate=2",
                partial(case, "sra2_s", more, mesh, lower),
            )
        yield (
            f"tiny/{method}/init",
            partial(case, "sra2_s", TINY | switch, MESHES["1"], adapter.lower_init),
        )
    for option in OPTIONS:
        yield (
            f"tiny/{said(option)}",
            partial(case, "sra2_s", TINY | option, MESHES["1"], adapter.lower_step),
        )


def sampler() -> Cases:
    def case(changes: dict, mesh: tuple, lower: Callable) -> str:
        return plain(lower("sra2_s", TINY | changes, mesh))

    guided = {"sampling.guidance": 1.5, "sampling.guidance_high": 0.7}
    guided |= {"sampling.guidance_low": 0.2}
    guidance = [{}, guided, guided | {"sampling.guidance_channels": 3}]
    for method, changes in itertools.product(
        ("euler", "heun", "euler_maruyama"), guidance
    ):
        changes = {"sampling.method": method} | changes
        for shape, mesh in MESHES.items():
            yield (
                f"{said(changes)}/{shape}",
                partial(case, changes, mesh, adapter.lower_sampler),
            )
    for path, what, method in itertools.product(
        ("linear", "gvp", "vp"),
        ("velocity", "noise", "data"),
        ("euler", "euler_maruyama"),
    ):
        changes = {
            "transport.path": path,
            "transport.prediction": what,
            "sampling.method": method,
            "model.learn_sigma": True,
        }
        yield (
            said(changes),
            partial(case, changes, MESHES["1"], adapter.lower_sampler),
        )
        yield (
            f"times/{path}/{method}/{what}",
            lambda path=path, method=method: listed(
                {"t": adapter.sampling_times(path, method, 50)}
            ),
        )
    for rounding, shape in itertools.product(("truncate", "sit"), MESHES):
        changes = {"sampling.rounding": rounding, "latents.shift_factor": 0.1}
        yield (
            f"decoder/{rounding}/{shape}",
            partial(case, changes, MESHES[shape], adapter.lower_decoder),
        )


def order() -> Cases:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "latents"
        adapter.encode_digits(data)

        def case(count: int, fields: tuple[str, ...] = (), **settings: int) -> str:
            rows = adapter.read_batches(data, count, fields, batch_size=16, **settings)
            keys = ("index", "label", *fields)
            return "\n".join(listed({key: row[key] for key in keys}) for row in rows)

        for seed, streams, (buffer, start), process in itertools.product(
            (0, 7),
            (1, 2, 8),
            ((2048, 0), (64, 0), (2048, 137)),
            ("0of1", "0of2", "1of2"),
        ):
            index, count = map(int, process.split("of"))
            if streams % count:
                continue
            settings = {
                "seed": seed,
                "streams": streams,
                "shuffle_buffer": buffer,
                "start_step": start,
                "process_index": index,
                "process_count": count,
            }
            yield said(settings), partial(case, 100, **settings)
        yield "images", partial(case, 90, ("image",), **settings)


def listed(tree: Any) -> str:
    """A line for each array: name, dtype, shape, hash of its bytes."""
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        shape = np.shape(leaf)
        lines.append(f"{jax.tree_util.keystr(path)} {array.dtype} {shape} {digest}")
    return "\n".join(sorted(lines))


def described(result: tuple[Any, Any]) -> str:
    """Settings and a tree."""
    settings, tree = result
    return json.dumps(settings, sort_keys=True, default=str) + "\n" + listed(tree)


def export() -> Cases:
    variants = {
        "plain": {},
        "learn_sigma": {"model.learn_sigma": True},
        "patch_1": {"model.patch_size": 1},
        "final": {f"align.{n}.head_final_layer": True for n in METHODS["all"]},
    }
    for name, changes in variants.items():
        changes = TINY | ALL | changes
        tree = adapter.seeded_state("sra2_s", changes)
        patch = changes.get("model.patch_size", 2)
        yield f"seeded/{name}/tree", partial(listed, tree)
        for reverse in (False, True):
            make = partial(adapter.export, tree, 8, patch, reverse)
            yield f"seeded/{name}/reverse={reverse}", lambda m=make: listed(m())
            yield (
                f"seeded/{name}/reverse={reverse}/back",
                lambda m=make: described(adapter.import_state_dict(m())),
            )
    for name in (
        *("sit", "sit_learn_sigma", "repa_sit", "sra_sit", "inception"),
        *("vae", "dinov2", "digits_vae", "digits_dinov2"),
    ):
        yield (
            f"golden/{name}",
            lambda name=name: described(adapter.load_golden(name)),
        )
    for name in ("vae", "dinov2"):
        yield f"saved/{name}", partial(saved, name)
    yield "saved/inception", saved_inception
    for kind, weights, heads, reverse in itertools.product(
        (".safetensors", ".npz"), ("ema", "raw"), (False, True), (False, True)
    ):
        yield (
            f"run/{weights},heads={heads},reverse={reverse}{kind}",
            partial(exported_run, kind, weights, heads, reverse),
        )


def files(folder: Path) -> str:
    """A line for each file: name and hash."""
    return "\n".join(
        f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


def saved(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_golden(name, Path(folder))
        return files(Path(folder))


def saved_inception() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.convert_inception(Path(folder))
        (Path(folder) / "in.npz").unlink()
        return files(path.parent)


def exported_run(kind: str, weights: str, heads: bool, reverse: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"out{kind}"
        tree, beside = adapter.export_run(RUN, out, weights, heads, reverse)
        return described((beside, tree))


def quickstart() -> Cases:
    """Runs main.py's default, or takes the folder in QUICKSTART; see `run_numbers`."""
    if QUICKSTART in os.environ:
        yield from run_numbers(Path(os.environ[QUICKSTART]))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "quickstart"
        command = [sys.executable, "main.py", "--config=configs/quickstart.py"]
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        subprocess.run(
            [*command, f"--workdir={run}"],
            cwd=ROOT,
            env=env,
            check=True,
            capture_output=True,
        )
        yield from run_numbers(run)


def run_numbers(run: Path) -> Cases:
    """The numbers, not the times, of all that a run of the quickstart has written."""
    for path in sorted((run / "latents").iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield f"latents/{path.name}", lambda digest=digest: digest
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    kinds = r"step$|loss|ratio|grad_norm|learning_rate|skipped|eval/"
    for key in sorted({k for row in rows for k in row if re.match(kinds, k)}):
        column = [[row["step"], row[key]] for row in rows if key in row]
        yield f"metrics/{key}", partial(json.dumps, column)
    for name, drop in (
        ("results", ("versions",)),
        ("run", ("compile_seconds",)),
        ("config", ()),
    ):
        facts = json.loads((run / f"{name}.json").read_text())
        facts = {k: v for k, v in facts.items() if k not in drop}
        text = json.dumps(facts, indent=1, sort_keys=True)
        yield f"{name}.json", partial(text.replace, str(run), "RUN")
    for path in sorted(run.rglob("*.png")):
        pixels = np.asarray(Image.open(path))
        yield str(path.relative_to(run)), partial(listed, {"png": pixels})
    for path in sorted(run.rglob("*.npz")):
        arrays = dict(np.load(path))
        yield str(path.relative_to(run)), partial(listed, arrays)
    leaves = adapter.checkpoint_leaves(run, 1500)
    yield (
        "checkpoint",
        partial(json.dumps, leaves, indent=1, sort_keys=True),
    )


PARTS = {f.__name__: f for f in (step, sampler, order, export, quickstart)}
