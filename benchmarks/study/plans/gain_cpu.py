"""Where SRA 2's gain over SiT begins, and what beats it, for two CPU cores in a night.

Data as of textures_cpu, of which it is the first 1,000 steps.
"""

from benchmarks.study.methods import LOGNORMAL, Keys, one_by_one
from benchmarks.study.plans import textures_cpu

config, keys = textures_cpu.config, textures_cpu.keys
stages = (1000,)
networks = {
    "narrow": {"model.width": 48, "model.heads": 2},
    "shallow": {"model.depth": 3, "align.teacher.teacher_depth": 3},
    "16 tokens": {"model.patch_size": 4},
}
# What hardly differs from others is for a GPU.
dropped = "lambda 0.3", "head of 1", "l1", "cosine"
methods = {
    name: changes
    for name, changes in one_by_one(networks, (4,), stages[-1]).items()
    if name.partition(", ")[2] not in dropped
}
# The three that lay lowest with uniform times, seeds 0 and 1.
for name in ("velocity", "z-score", "mean"):
    methods[f"SRA 2, lognormal, {name}"] = methods[f"SRA 2, {name}"] | LOGNORMAL
samplings: dict[str, dict[str, Keys]] = {}
baseline = "SiT"
seeds = 3
samples = 690
