"""What each method costs: python -m tools.cost --config=configs/sra2_xl.py.

Counted at the config's size from shapes alone (nothing is allocated): parameters and
the forward pass of one image. Measured by turns in one process, with the config of
--measure: time and peak memory of the training step. Prints a table, writes cost.json
and cost.png.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sra2_jax.models.heads import MLPHead
from sra2_jax.optim import make_optimizer
from sra2_jax.state import build_networks, count_parameters, create_sharded

from sra2_jax import config as configuration
from sra2_jax.command import run_program
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.models.dit import DiT
from sra2_jax.sharding import make_mesh
from sra2_jax.step import batch_shapes, make_draw, make_loss
from sra2_jax.weights import load_dinov2
from tools.measure import Timed, by_turns, prepare, ratio

# name -> sections of config.align that are on
METHODS: dict[str, tuple[str, ...]] = {
    "vanilla": (),
    "SRA 2": ("vae",),
    "REPA": ("encoder",),
    "SRA": ("teacher",),
    "REPA + SRA 2": ("encoder", "vae"),
}


def of_method(config: ConfigDict, name: str) -> ConfigDict:
    """A copy of `config` with one method's alignments on."""
    config = config.copy_and_resolve_references()
    for section in config.align:
        config.align[section].enabled = section in METHODS[name]
    return config


def dit_macs(model: DiT, depth: int, final: bool = True) -> int:
    """Multiply-accumulates of the first `depth` blocks for one image."""
    d, p = model.width, model.patch_size
    tokens, patch = (model.size // p) ** 2, p * p * model.channels
    hidden = int(d * model.mlp_ratio + 1e-6)
    dense = d * 3 * d + d * d + 2 * d * hidden
    block = tokens * dense + 2 * tokens * tokens * d + d * 6 * d
    ends = tokens * patch * d + 256 * d + d * d
    if final:
        out = patch * (2 if model.learn_sigma else 1)
        ends += d * 2 * d + tokens * d * out
    return ends + depth * block


def head_macs(head: MLPHead, width: int, tokens: int) -> int:
    """Multiply-accumulates of a head for one image."""
    sizes = (width, *head.widths, head.features)
    macs = tokens * sum(a * b for a, b in itertools.pairwise(sizes))
    return macs + (width * 2 * width if head.final_layer else 0)


def encoder_macs(config: DINOv2Config, grid: int) -> int:
    """Multiply-accumulates of DINOv2 for one image of grid x grid patches."""
    d, tokens = config.hidden_size, grid * grid + 1
    dense = 4 * d * d + 2 * d * int(d * config.mlp_ratio)
    block = tokens * dense + 2 * tokens * tokens * d
    return grid * grid * 3 * config.patch_size**2 * d + config.num_hidden_layers * block


def training_flops(config: ConfigDict, encoder: DINOv2 | None) -> float:
    """FLOPs of a training step by formula: 2 a multiply-accumulate, network and heads
    3 x their forward pass, encoder and teacher 1 x; what is computed again by
    rematerialisation does not count."""
    network, heads = build_networks(config)
    grid = network.size // network.patch_size
    macs = 3 * dit_macs(network, network.depth)
    macs += 3 * sum(head_macs(h, network.width, grid * grid) for h in heads.values())
    if encoder:
        macs += encoder_macs(encoder.config, grid)
    if "teacher" in heads:
        macs += dit_macs(network, config.align.teacher.teacher_depth, final=False)
    return 2.0 * macs * config.batch_size


def load_architecture(config: ConfigDict) -> DINOv2:
    """The encoder of config.align.encoder; DINOv2-B is known without its files."""
    model = config.align.encoder.model
    return (
        DINOv2(DINOv2Config())
        if model == "facebook/dinov2-base"
        else load_dinov2(model)[0]
    )


def xla_flops(config: ConfigDict, encoder: DINOv2) -> float:
    """FLOPs that XLA counts in the forward pass of one image, all operations.

    Of the unrolled network: of a loop XLA counts one turn.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = config.accumulate = 1
    config.mesh.data = config.mesh.fsdp = 1
    config.model.scan, config.model.remat = False, "none"
    config.model.attention, config.model.dtype = "xla", "float32"
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    transform, _ = make_optimizer(**config.optim)
    abstract, _ = create_sharded(config, transform, mesh)
    batch, step = batch_shapes(config, mesh), jax.ShapeDtypeStruct((), jnp.int32)
    draws = jax.eval_shape(make_draw(config), batch, step)
    frozen = {"teacher": abstract.params["network"], "encoder": _abstract(encoder)}
    loss = jax.jit(make_loss(config, encoder.clone(scan=False)))
    arguments = _plain((abstract.params, frozen, draws, step))
    counts: Any = loss.lower(*arguments).cost_analysis()
    return float(counts["flops"])


def _plain(tree: Any) -> Any:
    """Shapes without their placement."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _abstract(encoder: DINOv2) -> Any:
    side = encoder.config.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]


def counted(config: ConfigDict, name: str, encoder: DINOv2) -> dict[str, Any]:
    """Parameters, and FLOPs of one image's forward pass, of one method.

    The position table counts as a parameter, as in the papers' tables (it is not
    trained). GFLOPs are 2 x 10^9 multiply-accumulates of matrix products.
    """
    config = of_method(config, name)
    network, heads = build_networks(config)
    abstract, _ = create_sharded(
        config,
        make_optimizer(**config.optim)[0],
        make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )
    grid = network.size // network.patch_size
    macs = dit_macs(network, network.depth)
    extra = sum(head_macs(h, network.width, grid * grid) for h in heads.values())
    runs_encoder = "encoder" in heads and config.align.encoder.source == "images"
    if runs_encoder:
        extra += encoder_macs(encoder.config, grid)
    if "teacher" in heads:
        extra += dit_macs(network, config.align.teacher.teacher_depth, final=False)
    external = count_parameters(_abstract(encoder)) if runs_encoder else 0
    positions = grid * grid * network.width
    head_parameters = count_parameters(abstract.params["heads"])
    return {
        "method": name,
        "network_parameters": count_parameters(abstract.params["network"]) + positions,
        "head_parameters": head_parameters,
        "external_parameters": external,
        "added_parameters": head_parameters + external,
        "forward_gmacs": (macs + extra) / 1e9,
        "forward_gflops": 2 * (macs + extra) / 1e9,
        "extra_percent": 100 * extra / macs,
        "xla_gflops": xla_flops(config, encoder) / 1e9,
    }


def measured(
    config: ConfigDict, encoder: DINOv2, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Seconds and peak bytes of each method's training step, by turns."""
    runs: dict[str, Timed] = {}
    for name in METHODS:
        runs[name] = prepare(of_method(config, name), encoder)
        print(f"{name}: compiled in {runs[name].compile_seconds:.1f} s", flush=True)
    by_turns(runs, rounds, steps)
    rows = {}
    for name, run in runs.items():
        median, low, high = ratio(run, runs["vanilla"])
        rows[name] = {
            "step_seconds": float(np.median(run.seconds)),
            "time_over_vanilla": median,
            "time_over_vanilla_range": [low, high],
            "peak_bytes": run.peak_bytes,
        }
    return rows


def short(value: float) -> str:
    """118.6, 6.05, 0.0174 in eight columns."""
    return f"{value:>8.1f}" if value >= 10 else f"{value:>8.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'method':14}{'network':>9}{'heads':>8}{'external':>9}{'GMAC':>8}"
        f"{'GFLOPs':>8}{'extra':>8}{'XLA GF':>8}"
    )
    timed = "step_seconds" in rows[0]
    head += f"{'s/step':>9}{'x vanilla':>11}{'peak MB':>9}" if timed else ""
    lines = [head]
    for row in rows:
        parameters = (
            f"{row[f'{kind}_parameters'] / 1e6:.1f}M"
            for kind in ("network", "head", "external")
        )
        a, b, c = parameters
        line = (
            f"{row['method']:14}{a:>9}{b:>8}{c:>9}{short(row['forward_gmacs'])}"
            f"{short(row['forward_gflops'])}{row['extra_percent']:>+7.1f}%"
            f"{short(row['xla_gflops'])}"
        )
        if timed:
            line += f"{row['step_seconds']:>9.3f}{row['time_over_vanilla']:>11.3f}"
            line += f"{row['peak_bytes'] / 1e6:>9.0f}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the costs, one row of bars a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["method"] for row in rows][::-1]
    panels = [
        (
            "Counted: heads and\nexternal parameters, M",
            "added_parameters",
            1e-6,
            ".1f",
        ),
        ("Counted: forward pass\nover vanilla, %", "extra_percent", 1, "+.1f"),
        ("Timed: training step\nover vanilla, times", "time_over_vanilla", 1, ".2f"),
        ("Timed: peak memory,\nMB a device", "peak_bytes", 1e-6, ".0f"),
    ]
    panels = [panel for panel in panels if panel[1] in rows[0]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.2, 2.9), sharey=True
    )
    for axis, (label, key, unit, form) in zip(axes, panels, strict=True):
        values = [unit * row[key] for row in rows][::-1]
        colors = ["#0072b2" if n == "SRA 2" else "#9aa5b1" for n in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{v:{form}}" for v in values], padding=3, fontsize=9)
        axis.set_xlim(0, 1.28 * max(values) or 1)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
        axis.tick_params(left=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.text(0.5, 0.03, title, fontsize=10, ha="center", color="#555555")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--measure", metavar="FILE", help="config to time; nothing is timed without")
    add("--batch_size", type=int, help="of the timed steps (the config's)")
    add("--dtype", help="of the timed steps (the config's)")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="of a method a round (%(default)s)")
    add("--out", type=Path, default=Path("runs/cost"), help="folder (%(default)s)")
    arguments, config = configuration.parse_arguments(parser, "configs/sra2_xl.py")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out={arguments.out} is not a folder")
    encoder = load_architecture(config)
    rows = [counted(config, name, encoder) for name in METHODS]
    title = f"Counted: {config.name}, one image"
    if arguments.measure:
        timed = configuration.load(arguments.measure)
        timed.batch_size = arguments.batch_size or timed.batch_size
        timed.model.dtype = arguments.dtype or timed.model.dtype
        timed.data.streams = 1
        results = measured(
            timed, load_architecture(timed), arguments.rounds, arguments.steps
        )
        rows = [row | results[row["method"]] for row in rows]
        title += (
            f"; timed: {timed.name}, batch {timed.batch_size}, {timed.model.dtype}, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        )
    print(f"{title}; jax {jax.__version__}\n{table(rows)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"title": title, "jax": jax.__version__, "methods": rows}
    (arguments.out / "cost.json").write_text(json.dumps(facts, indent=2) + "\n")
    plot(rows, title, arguments.out / "cost.png")


if __name__ == "__main__":
    run_program(main)
