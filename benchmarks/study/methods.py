"""Changes of a config that make it one of the methods, for plans.

Blocks and what depends on the network's size stay as the plan's config has them.
"""

from typing import Any

Keys = dict[str, Any]

SIT: Keys = {"align.vae.enabled": False}
SRA2: Keys = {}
# of an encoder at {data}/encoder, whose features lie with the latents
REPA: Keys = SIT | {
    "align.encoder.enabled": True,
    "align.encoder.source": "features",
    "align.encoder.model": "{data}/encoder",
}
SRA: Keys = SIT | {"align.teacher.enabled": True}
IG: Keys = {
    "align.vae.target": "velocity",
    "align.vae.loss": "l2",
    "align.vae.weight": 0.5,
    "align.vae.head_layers": 1,
    "align.vae.head_final_layer": True,
}
LOGNORMAL: Keys = {"transport.time": "lognormal"}

UNIFORM = {"SiT": SIT, "SRA 2": SRA2, "REPA": REPA, "SRA": SRA, "IG": IG}
ALL = UNIFORM | {f"{k}, lognormal": v | LOGNORMAL for k, v in UNIFORM.items()}
