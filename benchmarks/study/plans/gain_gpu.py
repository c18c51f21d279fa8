"""Where SRA 2's gain over SiT begins, and what beats it: one thing changed at a time.

Data as of textures_gpu.
"""

from benchmarks.study.methods import Keys, one_by_one
from benchmarks.study.plans import textures_gpu

config, keys = textures_gpu.config, textures_gpu.keys
stages = 5000, 10_000, 20_000
networks = {
    "narrow": {"model.width": 192, "model.heads": 3},
    "shallow": {"model.depth": 6},
    "256 tokens": {"model.patch_size": 1},
}
methods = one_by_one(networks, (4, 8), stages[-1])
samplings: dict[str, dict[str, Keys]] = {}
baseline = "SiT"
seeds = 3
samples = 4000
