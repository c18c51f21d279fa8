"""How fast a compiled program could be on a chip: an estimate, no measurement."""

from sra2_jax.chips import Chip
from tools.hlo import Counts

# What an estimate takes for granted, of the nominal figures; those that were measured
# on an H200.
MATMUL_SHARE, BANDWIDTH_SHARE = 0.8, 0.9


def estimate(
    counts: Counts, flops: float, chip: Chip, devices: int
) -> dict[str, float]:
    """Seconds of a step, and MFU.

    An instruction with a matrix product takes the longer of its arithmetic and its
    traffic, every other one its traffic, at MATMUL_SHARE of the chip's FLOPs and
    BANDWIDTH_SHARE of its bandwidth, one after the other. Collectives go round a ring
    along one axis of the network, behind the rest ("hidden") or after it ("exposed").

    Args:
      flops: of the step by formula, over all devices; MFU is counted from them.
    """
    speed, bandwidth = MATMUL_SHARE * chip.flops, BANDWIDTH_SHARE * chip.bandwidth
    compute = sum(
        runs * max(flops / speed, size / bandwidth)
        for flops, size, runs in counts.products
    )
    others = sum(counts.traffic[k] for k in ("elementwise", "copy", "custom"))
    memory = others / bandwidth
    wire = 0.0
    for (kind, _), size in counts.collective_bytes.items():
        # A ring sends an array once to gather or scatter it, twice to reduce it.
        rounds = 2 if kind == "all-reduce" else 1
        wire += rounds * size * (devices - 1) / devices / chip.links
    busy = compute + memory
    best, worst = max(busy, wire), busy + wire
    peak = flops / (chip.flops * devices)
    return {
        "matmul_seconds": compute,
        "memory_seconds": memory,
        "collective_seconds": wire,
        "step_seconds_hidden": best,
        "step_seconds_exposed": worst,
        "mfu_hidden": peak / best,
        "mfu_exposed": peak / worst,
    }
