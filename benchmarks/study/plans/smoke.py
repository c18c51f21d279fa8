"""A few steps of textures_gpu with a tiny network, to see it work: no evidence."""

from benchmarks.study.methods import ALL
from benchmarks.study.plans import textures_gpu

config = textures_gpu.config
keys = textures_gpu.keys | {
    "model.width": 64, "model.depth": 2, "model.heads": 2, "batch_size": 8,
    "align.vae.depth": 1, "align.encoder.depth": 1, "align.teacher.teacher_depth": 2,
    "sampling.steps": 2, "sampling.batch_size": 46,
}  # fmt: skip
methods = {name: ALL[name] for name in ("SiT", "SRA 2", "REPA, lognormal")}
samplings = {"SRA 2": {"head 1.4": {"sampling.head_guidance": 1.4}}}
baseline = "SiT"
stages = 2, 4
seeds = 3
samples = 138
