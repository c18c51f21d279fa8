"""The table of docs/aot.md: SiT-XL/2 + SRA 2 compiled for chips that are not there.

    python -m benchmarks.topologies > table.md

Needs `pip install -e '.[aot,aot-gpu]'`. Half a minute to two minutes a row on two CPU
cores. GPUs come first: XLA reads its flags once.
"""

from typing import Any

from sra2_jax import config_file
from sra2_jax.chips import compile_only
from sra2_jax.command import Parser, run_program
from tools.aot import describe

HEAD = (
    "| px | topology | chips | batch | flags | GB a chip | fits | collectives, GB "
    "| step, ms | images/s | MFU |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
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


def span(low: str, high: str) -> str:
    """Two ends as text, one where they are alike."""
    return low if low == high else f"{low} to {high}"


def row(
    resolution: int, topology: str, batch: int, flags: str, facts: dict[str, Any]
) -> str:
    """One line of the table."""
    peak, limit = facts["peak_bytes"], facts["memory_bytes"]
    needs = f"{peak / 1e9:.1f}" if peak else "more"
    cells = [resolution, topology, facts["devices"], batch, flags or "-"]
    cells += [f"{needs} of {limit / 1e9:.1f}", "yes" if facts["fits"] else "**no**"]
    if facts["program"]:
        moved = sum(c["bytes"] for c in facts["program"]["collectives"].values()) / 1e9
        best, worst = (
            facts["estimate"][f"step_seconds_{name}"] for name in ("hidden", "exposed")
        )
        mfu = facts["estimate"]["mfu_exposed"], facts["estimate"]["mfu_hidden"]
        cells += [f"{moved:.2f}", span(f"{1e3 * best:.0f}", f"{1e3 * worst:.0f}")]
        cells += [span(f"{batch / worst:,.0f}", f"{batch / best:,.0f}")]
        cells += [span(f"{mfu[0]:.0%}", f"{mfu[1]:.0%}")]
    else:
        cells += [""] * 4
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="topologies that start so: v5e")
    arguments = parser.parse_args()
    compile_only()
    print(HEAD, flush=True)
    for resolution, topology, batch, flags in CASES:
        if not topology.startswith(arguments.only):
            continue
        name = "sra2_xl" if resolution == 256 else "sra2_xl_512"
        config = config_file.load(name, f"batch_size={batch}", *flags.split())
        facts = describe(config, topology)
        print(row(resolution, topology, batch, flags, facts), flush=True)


if __name__ == "__main__":
    run_program(main)
