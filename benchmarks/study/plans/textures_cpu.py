"""Crops of photographs at 64 px, 64 tokens, a small network, for two CPU cores in a
night: every method, uniform and logit-normal times; guidance at equal passes.

docs/evidence.md says how {data} is made.
"""

from benchmarks.study.methods import ALL
from benchmarks.study.plans.drawings_cpu import samplings as samplings

config = "configs/digits.py"
keys = {
    "data.dir": "{data}/latents", "data.images": "", "data.resolution": 64,
    "data.num_classes": 23, "vae": "{data}/vae", "latents.size": 16,
    "latents.scaling_factor": 1.0, "model.patch_size": 2,
    "batch_size": 32, "optim.learning_rate": 1e-3,
    "align.encoder.width": 128, "run.log_every": 100, "sampling.method": "heun",
    "sampling.steps": 20, "sampling.batch_size": 115, "run.grid_classes": 23,
}  # fmt: skip
methods = ALL
baseline = "SiT"
stages = 500, 1000, 2000
seeds = 3
samples = 690
