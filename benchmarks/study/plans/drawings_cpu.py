"""Drawings at 64 px, 64 tokens, for two CPU cores overnight: question (a).

docs/evidence.md says how {data} is made.
"""

from typing import Any

config = "configs/quickstart.py"
keys = {
    "data.dir": "{data}/latents", "data.images": "", "data.resolution": 64,
    "data.num_classes": 7, "vae": "{data}/vae", "latents.size": 8,
    "latents.scaling_factor": 1.0, "batch_size": 32, "optim.learning_rate": 1e-3,
    "ema_decay": 0.999, "sampling.method": "heun", "sampling.steps": 20,
    "sampling.labels": "balanced", "run.grid_classes": 7,
}  # fmt: skip
SIT = {"align.vae.enabled": False}
LOGNORMAL = {"transport.time": "lognormal"}
REPA = SIT | {
    "align.encoder.enabled": True, "align.encoder.source": "features",
    "align.encoder.model": "{data}/encoder",
}  # fmt: skip
SRA = SIT | {"align.teacher.enabled": True}
IG = {
    "align.vae.target": "velocity", "align.vae.loss": "l2", "align.vae.weight": 0.5,
    "align.vae.head_layers": 1, "align.vae.head_final_layer": True,
}  # fmt: skip
uniform: dict[str, dict[str, Any]] = {
    "SiT": SIT, "SRA 2": {}, "REPA": REPA, "SRA": SRA, "IG": IG,
}  # fmt: skip
methods = uniform | {f"{k}, lognormal": v | LOGNORMAL for k, v in uniform.items()}
baseline = "SiT"
stages = 1000, 2000, 4000, 8000
seeds = 3
samples = 1000
