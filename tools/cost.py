"""What each method costs: python -m tools.cost --config=configs/sra2_xl.py.

Counted at the config's size from shapes alone (nothing is allocated): parameters and
the forward pass of one image. Measured by turns in one process, with the config of
--measure: time and peak memory of the training step. Prints a table, writes cost.json.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax import config_file
from sra2_jax.alignment import ALIGNMENTS
from sra2_jax.alignment.base import head_macs
from sra2_jax.command import Parser, run_program
from sra2_jax.config import Config
from sra2_jax.config_file import INTERNAL_GUIDANCE
from sra2_jax.errors import UserError
from sra2_jax.programs.fit import peak_bytes
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program, count_parameters
from tools.measure import by_turns, prepare, ratio


def _methods() -> Iterator[tuple[str, dict[str, Any]]]:
    for on in ((), *((name,) for name in ALIGNMENTS), ("encoder", "vae")):
        title = " + ".join(ALIGNMENTS[name]().title for name in on) or "vanilla"
        keys: dict[str, Any] = {f"align.{n}.enabled": n in on for n in ALIGNMENTS}
        yield title, keys
        if on == ("vae",):
            other = {f"align.vae.{k}": v for k, v in INTERNAL_GUIDANCE.items()}
            yield "Internal Guidance", keys | other


# title -> the keys that make it: "vanilla", "SRA 2", ..., "REPA + SRA 2"
METHODS = dict(_methods())


def of_method(config: Config, title: str) -> Config:
    """A copy of `config` that trains by one method."""
    return config.override(METHODS[title])


def describe(config: Config) -> Program:
    """The config on one device, of which nothing is used."""
    return Program(config, make_mesh(devices=jax.devices()[:1]), "xla")


def xla_flops(config: Config) -> float:
    """FLOPs that XLA counts in the forward pass of one image, all operations."""
    keys = ("batch_size", "accumulate", "mesh.data", "mesh.fsdp")
    one = dict.fromkeys(keys, 1)
    plain = {"model.scan": False, "model.remat": "none", "model.dtype": "float32"}
    plain["model.attention"] = "xla"
    program = describe(config.override(one | plain))
    for align in program.alignments.values():
        if align.frozen:  # unrolled: of a loop XLA counts one turn
            vars(align)["frozen"] = align.frozen.clone(scan=False)
    params, step = program.abstract.params, jax.ShapeDtypeStruct((), jnp.int32)
    draws = jax.eval_shape(program.draw, program.batch, step)
    inputs = params, params["network"], program.frozen, draws, step
    counts: Any = jax.jit(program.loss).lower(*inputs).cost_analysis()
    return float(counts["flops"])


def counted(config: Config, title: str) -> dict[str, Any]:
    """Parameters, and FLOPs of one image's forward pass, of one method.

    The position table counts as a parameter, as in the papers' tables (it is not
    trained). GFLOPs are 2 x 10^9 multiply-accumulates of matrix products.
    """
    config = of_method(config, title)
    program = describe(config)
    network, params = program.network, program.abstract.params
    tokens, macs = network.grid**2, network.macs(network.model.depth)
    extra = sum(head_macs(head, tokens) for head in params["heads"].values())
    extra += sum(a.macs(network) for a in program.alignments.values())
    positions = tokens * network.model.width
    heads, external = map(count_parameters, (params["heads"], program.frozen))
    return {
        "method": title,
        "network_parameters": count_parameters(params["network"]) + positions,
        "head_parameters": heads,
        "external_parameters": external,
        "added_parameters": heads + external,
        "forward_gmacs": (macs + extra) / 1e9,
        "forward_gflops": 2 * (macs + extra) / 1e9,
        "extra_percent": 100 * extra / macs,
        "xla_gflops": xla_flops(config) / 1e9,
    }


def measured(config: Config, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Seconds and peak bytes of each method's training step, by turns."""
    runs = {}
    for title in METHODS:
        runs[title] = prepare(of_method(config, title))
        print(f"{title}: compiled in {runs[title].compile_seconds:.1f} s", flush=True)
    by_turns(runs, rounds, steps)
    rows = {}
    for title, run in runs.items():
        median, low, high = ratio(run, runs["vanilla"])
        rows[title] = {
            "step_seconds": float(np.median(run.seconds)),
            "time_over_vanilla": median,
            "time_over_vanilla_range": [low, high],
            "peak_bytes": peak_bytes(run.step),
        }
    return rows


def short(value: float) -> str:
    """118.6, 6.05, 0.0174 in eight columns."""
    return f"{value:>8.1f}" if value >= 10 else f"{value:>8.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'method':18}{'network':>9}{'heads':>8}{'external':>9}{'GMAC':>8}"
        f"{'GFLOPs':>8}{'extra':>8}{'XLA GF':>8}"
    )
    timed = "step_seconds" in rows[0]
    head += f"{'s/step':>9}{'x vanilla':>11}{'peak MB':>9}" if timed else ""
    lines = [head]
    for row in rows:
        a, b, c = (
            f"{row[f'{kind}_parameters'] / 1e6:.1f}M"
            for kind in ("network", "head", "external")
        )
        line = (
            f"{row['method']:18}{a:>9}{b:>8}{c:>9}{short(row['forward_gmacs'])}"
            f"{short(row['forward_gflops'])}{row['extra_percent']:>+7.1f}%"
            f"{short(row['xla_gflops'])}"
        )
        if timed:
            line += f"{row['step_seconds']:>9.3f}{row['time_over_vanilla']:>11.3f}"
            line += f"{row['peak_bytes'] / 1e6:>9.0f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--measure", metavar="FILE", help="config to time; nothing is timed without")
    add("--batch_size", type=int, help="of the timed steps (the config's)")
    add("--dtype", help="of the timed steps (the config's)")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=2, help="of a method a round (%(default)s)")
    add("--out", type=Path, default=Path("runs/cost"), help="folder (%(default)s)")
    arguments, config = parser.parse_config("sra2_xl")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out={arguments.out} is not a folder")
    rows = [counted(config, title) for title in METHODS]
    title = f"Counted: {config.name}, one image"
    if arguments.measure:
        timed = config_file.load(arguments.measure)
        given = {
            "batch_size": arguments.batch_size or timed.batch_size,
            "model.dtype": arguments.dtype or timed.model.dtype,
        }
        timed = timed.override(given)
        results = measured(timed, arguments.rounds, arguments.steps)
        rows = [row | results[row["method"]] for row in rows]
        title += (
            f"; timed: {timed.name}, batch {timed.batch_size}, {timed.model.dtype}, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        )
    print(f"{title}; jax {jax.__version__}\n{table(rows)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"title": title, "jax": jax.__version__, "methods": rows}
    (arguments.out / "cost.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)
