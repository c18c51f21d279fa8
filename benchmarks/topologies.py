"""Programs compiled for chips that are not there: docs/topologies.csv (SiT-XL/2 +
SRA 2), of which docs/aot.md shows some, or with --published docs/reproduce.md's table.

    python -m benchmarks.topologies > docs/topologies.csv

Needs `pip install -e '.[aot,aot-gpu]'`. Half a minute to two minutes a row on two CPU
cores. GPUs come first: XLA reads its flags once.
"""

import csv
import sys
from typing import Any

from sra2_jax import config_file
from sra2_jax.chips import compile_only
from sra2_jax.command import Parser, run_program
from tools.aot import describe

HEAD = (
    "px", "topology", "chips", "batch", "flags", "GB a chip", "fits",
    "collectives, GB", "step, ms", "images/s", "MFU",
)  # fmt: skip
# Resolution, topology, batch, and what differs from the config.
CASES = [
    (256, "h200:1", 256, ""),
    (256, "h200:1", 256, "model.remat=attention"),
    (256, "h200:1", 256, "model.scan=False model.remat=none"),
    (512, "h200:1", 64, "model.scan=False model.remat=none"),
    (256, "h200:8", 256, "mesh.fsdp=8 model.scan=False model.remat=none"),
    (256, "h200:8", 2048, "mesh.fsdp=8 model.scan=False model.remat=none"),
    (256, "v5e:4x4", 256, ""),
    (256, "v5e:4x4", 256, "mesh.fsdp=16"),
    (256, "v5e:4x4", 1024, "mesh.fsdp=16"),
    (256, "v5e:4x4", 1024, "mesh.fsdp=16 model.remat=full"),
    (256, "v6e:4x4", 256, ""),
    (256, "v6e:4x4", 256, "mesh.fsdp=16"),
    (256, "v6e:4x4", 1024, "mesh.fsdp=16"),
    (256, "v6e:4x4", 1024, "mesh.fsdp=16 accumulate=4"),
    (256, "v5p:4x4x4", 256, ""),
    (256, "v5p:4x4x4", 256, "mesh.fsdp=64"),
    (256, "v5p:4x4x4", 1024, "mesh.fsdp=64"),
    (256, "v5p:4x4x4", 4096, "mesh.fsdp=64"),
    (256, "v5e:1x1", 256, "model.remat=full accumulate=32"),
    (256, "v5e:2x2", 256, "mesh.fsdp=4 model.remat=full"),
    (256, "v6e:1x1", 256, "accumulate=8"),
    (256, "v5p:1x1x1", 256, "accumulate=2"),
    (256, "v5p:2x2x1", 256, "model.scan=False model.remat=none"),
    (512, "v5e:4x4", 256, "mesh.fsdp=16"),
    (512, "v5e:4x4", 256, "mesh.fsdp=16 model.remat=full"),
    (512, "v6e:4x4", 256, "mesh.fsdp=16"),
    (512, "v6e:4x4", 256, "mesh.fsdp=16 model.remat=full"),
    (512, "v5p:4x4x4", 256, ""),
    (512, "v5p:4x4x4", 256, "mesh.fsdp=64"),
    (512, "v5p:4x4x4", 1024, "mesh.fsdp=64"),
    (512, "v5e:2x2", 256, "mesh.fsdp=4 model.remat=full accumulate=4"),
    (512, "v6e:1x1", 256, "model.remat=full accumulate=32"),
    (512, "v5p:1x1x1", 256, "accumulate=8"),
]

# What is to be reproduced: name -> config and what differs from it.
LARGE = "model.width=1024 model.depth=24 model.heads=16"
PUBLISHED = {
    "SiT-B/2": ("sra2_b", "align.vae.enabled=False"),
    "SRA 2, B/2": ("sra2_b", ""),
    "REPA, B/2": ("repa_b", ""),
    "SRA, B/2": ("sra_b", ""),
    "SiT-L/2": ("sra2_l", "align.vae.enabled=False"),
    "SRA 2, L/2": ("sra2_l", ""),
    "REPA, L/2": ("repa_xl", LARGE),
    "SRA, L/2": (
        "sra_xl",
        f"{LARGE} align.teacher.depth=6 align.teacher.teacher_depth=18",
    ),
    "SiT-XL/2": ("sra2_xl", "align.vae.enabled=False"),
    "SRA 2, XL/2": ("sra2_xl", ""),
    "REPA, XL/2": ("repa_xl", ""),
    "SRA, XL/2": ("sra_xl", ""),
}
MACHINES = {
    "h200:8": "mesh.fsdp=8 model.scan=False model.remat=none",
    "v5e:4x4": "mesh.fsdp=16",
    "v6e:4x4": "mesh.fsdp=16",
}
STEPS = 400_000


def published(only: str) -> None:
    """Memory of a chip and, by the roofline, hours to STEPS at batch 256."""
    machines = {name: f for name, f in MACHINES.items() if name.startswith(only)}
    print("| setting | " + " | ".join(f"{m}, GB, hours" for m in machines) + " |")
    print("|---" * (1 + len(machines)) + "|", flush=True)
    for title, (name, changes) in PUBLISHED.items():
        cells = []
        for topology, flags in machines.items():
            config = config_file.load(name, *changes.split(), *flags.split())
            facts = describe(config, topology)
            if not facts["fits"]:
                cells.append("does not fit")
                continue
            hours = (f"{STEPS * s / 3600:.2g}" for s in step_seconds(facts))
            cells.append(f"{facts['peak_bytes'] / 1e9:.1f}, {span(*hours)}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def step_seconds(facts: dict[str, Any]) -> tuple[float, float]:
    """Of the estimate, with collectives that hide and with none that does."""
    estimate = facts["estimate"]
    return estimate["step_seconds_hidden"], estimate["step_seconds_exposed"]


def span(low: str, high: str) -> str:
    """Two ends as text, one where they are alike."""
    return low if low == high else f"{low} to {high}"


def row(
    resolution: int, topology: str, batch: int, flags: str, facts: dict[str, Any]
) -> list[Any]:
    """One line of the table."""
    peak, limit = facts["peak_bytes"], facts["memory_bytes"]
    needs = f"{peak / 1e9:.1f}" if peak else "more"
    cells = [resolution, topology, facts["devices"], batch, flags or "-"]
    cells += [f"{needs} of {limit / 1e9:.1f}", "yes" if facts["fits"] else "no"]
    if facts["program"]:
        moved = sum(c["bytes"] for c in facts["program"]["collectives"].values()) / 1e9
        best, worst = step_seconds(facts)
        mfu = facts["estimate"]["mfu_exposed"], facts["estimate"]["mfu_hidden"]
        cells += [f"{moved:.2f}", span(f"{1e3 * best:.0f}", f"{1e3 * worst:.0f}")]
        cells += [span(f"{batch / worst:,.0f}", f"{batch / best:,.0f}")]
        cells += [span(f"{mfu[0]:.0%}", f"{mfu[1]:.0%}")]
    else:
        cells += [""] * 4
    return cells


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="topologies that start so: v5e")
    parser.add_argument("--published", action="store_true", help="docs/reproduce.md's")
    arguments = parser.parse_args()
    compile_only()
    if arguments.published:
        return published(arguments.only)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(HEAD)
    for resolution, topology, batch, flags in CASES:
        if not topology.startswith(arguments.only):
            continue
        name = "sra2_xl" if resolution == 256 else "sra2_xl_512"
        config = config_file.load(name, f"batch_size={batch}", *flags.split())
        facts = describe(config, topology)
        table.writerow(row(resolution, topology, batch, flags, facts))
        sys.stdout.flush()


if __name__ == "__main__":
    run_program(main)
