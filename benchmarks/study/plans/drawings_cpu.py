"""Drawings at 64 px, 64 tokens, for two CPU cores overnight: every method, uniform and
logit-normal times; and guidance by the head against classifier-free guidance at equal
passes of the network.

docs/evidence.md says how {data} is made.
"""

from benchmarks.study.methods import ALL

config = "configs/digits.py"
keys = {
    "data.dir": "{data}/latents", "data.images": "", "data.resolution": 64,
    "data.num_classes": 7, "vae": "{data}/vae", "latents.size": 16,
    "latents.scaling_factor": 1.0, "model.patch_size": 2, "batch_size": 32,
    "optim.learning_rate": 1e-3, "ema_decay": 0.999, "align.encoder.width": 128,
    "sampling.method": "heun", "sampling.steps": 20, "run.grid_classes": 7,
}  # fmt: skip
methods = ALL
samplings = {
    "SRA 2": {
        "head 1.4": {"sampling.head_guidance": 1.4},
        "head 1.8": {"sampling.head_guidance": 1.8},
        "two passes 1.4": {"sampling.guidance": 1.4, "sampling.steps": 10},
        "two passes 1.8": {"sampling.guidance": 1.8, "sampling.steps": 10},
    }
}
baseline = "SiT"
stages = 1000, 2000, 4000, 8000
seeds = 3
samples = 1000
