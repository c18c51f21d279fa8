"""Where SRA 2's gain over SiT begins, and what beats it: one thing changed at a time.

Data as of textures_gpu.
"""

from benchmarks.study.methods import LOGNORMAL, SIT, Keys
from benchmarks.study.plans import textures_gpu

config, keys = textures_gpu.config, textures_gpu.keys
# of the network, with and without SRA 2
NETWORKS: dict[str, Keys] = {
    "narrow": {"model.width": 192, "model.heads": 3},
    "shallow": {"model.depth": 6},
    "256 tokens": {"model.patch_size": 1},
}
VARIANTS: dict[str, Keys] = {
    **{f"block {n}": {"align.vae.depth": n} for n in (4, 8)},
    **{f"lambda {w}": {"align.vae.weight": w} for w in (0.25, 1.0)},
    "head of 1": {"align.vae.head_layers": 1},
    "l2": {"align.vae.loss": "l2"},
    "cosine": {"align.vae.loss": "cosine"},
    "t below 0.5": {"align.vae.t_max": 0.5},
    "mean": {"align.vae.target": "mean"},
    "velocity": {"align.vae.target": "velocity"},
    "z-score": {"align.vae.zscore": True},
    "early stop": {
        "align.vae.schedule": "linear", "align.vae.schedule_start": 5000,
        "align.vae.schedule_steps": 1,
    },
    "cosine schedule": {
        "align.vae.schedule": "cosine", "align.vae.schedule_steps": 20_000,
    },
}  # fmt: skip
methods = {
    "SiT": SIT,
    "SiT, lognormal": SIT | LOGNORMAL,
    "SRA 2": {},
    **{f"SiT, {name}": SIT | network for name, network in NETWORKS.items()},
    **{f"SRA 2, {name}": v for name, v in (NETWORKS | VARIANTS).items()},
}
samplings: dict[str, dict[str, Keys]] = {}
baseline = "SiT"
stages = 5000, 10_000, 20_000
seeds = 3
samples = 4000
