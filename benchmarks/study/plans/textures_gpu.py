"""Crops of photographs at 128 px, SiT-S with 256 tokens, for a GPU in pieces: every
method, uniform and logit-normal times; guidance at equal passes.

docs/evidence.md says how {data} is made, here with --resolution=128.
"""

from benchmarks.study.methods import ALL
from benchmarks.study.plans.drawings_cpu import samplings as samplings

config = "configs/sra2_s.py"
keys = {
    "data.dir": "{data}/latents", "data.resolution": 128, "data.num_classes": 23,
    "vae": "{data}/vae", "latents.size": 16, "latents.scaling_factor": 1.0,
    "model.patch_size": 1, "model.scan": False, "model.remat": "none",
    "batch_size": 256, "ema_decay": 0.999, "align.encoder.width": 128,
    "sampling.method": "heun", "sampling.steps": 25, "sampling.batch_size": 512,
    "sampling.labels": "balanced", "run.grid_classes": 10,
}  # fmt: skip
methods = ALL
baseline = "SiT"
stages = 2000, 5000, 10_000, 20_000
seeds = 3
samples = 4000
