"""Crops of photographs at 64 px, SiT-S with 64 tokens, for a GPU: what aligns with the
latent or an encoder against what does not, uniform and logit-normal times; guidance at
equal passes.

docs/evidence.md says how {data} is made.
"""

from benchmarks.study.methods import ALL
from benchmarks.study.plans.drawings_cpu import samplings as samplings

config = "configs/sra2_s.py"
keys = {
    "data.dir": "{data}/latents", "data.resolution": 64, "data.num_classes": 23,
    "vae": "{data}/vae", "latents.size": 16, "latents.scaling_factor": 1.0,
    "model.scan": False, "model.remat": "none", "batch_size": 256,
    "optim.learning_rate": 5e-4, "ema_decay": 0.995, "align.encoder.width": 128,
    "sampling.method": "heun", "sampling.steps": 25, "sampling.batch_size": 500,
    "sampling.labels": "balanced", "run.grid_classes": 10,
}  # fmt: skip
methods = {k: v for k, v in ALL.items() if k.split(",")[0] in ("SiT", "SRA 2", "REPA")}
baseline = "SiT"
stages = 2500, 5000, 10_000
seeds = 3
samples = 2000
