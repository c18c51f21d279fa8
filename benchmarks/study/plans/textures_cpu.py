"""Crops of photographs at 64 px, 64 tokens, a small network, for two CPU cores: what
aligns with the latent or an encoder against what does not; logit-normal times.

docs/evidence.md says how {data} is made.
"""

from benchmarks.study.methods import ALL

config = "configs/digits.py"
keys = {
    "data.dir": "{data}/latents", "data.images": "", "data.resolution": 64,
    "data.num_classes": 23, "vae": "{data}/vae", "latents.size": 16,
    "latents.scaling_factor": 1.0, "model.width": 128, "model.patch_size": 2,
    "batch_size": 32, "optim.learning_rate": 1e-3, "ema_decay": 0.995,
    "align.encoder.width": 128, "run.log_every": 100, "sampling.method": "heun",
    "sampling.steps": 20, "sampling.batch_size": 115, "run.grid_classes": 23,
}  # fmt: skip
methods = {
    name: ALL[name]
    for name in ("SiT", "SRA 2", "REPA", "SiT, lognormal", "SRA 2, lognormal")
}
samplings: dict[str, dict[str, dict[str, float]]] = {}
baseline = "SiT"
stages = 1000, 2000, 4000
seeds = 3
samples = 690
