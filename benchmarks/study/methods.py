"""Changes of a config that make it one of the methods, for plans.

Blocks and what depends on the network's size stay as the plan's config has them.
"""

from typing import Any

from sra2_jax.alignment.irepa import ConvHead
from sra2_jax.alignment.vae import LatentAlignment
from sra2_jax.models.dit import DiT

Keys = dict[str, Any]


class ConvolutionalHead(LatentAlignment):
    """SRA 2 with iREPA's head. A method has it by the key "head", the study's own."""

    def head(self, network: DiT) -> ConvHead:
        return ConvHead(self.features(network), network.grid, network.dtype)


HEADS = {"convolution": ConvolutionalHead}


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


def one_by_one(
    networks: dict[str, Keys], blocks: tuple[int, ...], steps: int
) -> dict[str, Keys]:
    """SiT and SRA 2, also with other networks, and SRA 2 with one thing changed.

    blocks: to align in place of the config's; steps: of the study, a quarter of which
    "early stop" aligns.
    """
    variants: dict[str, Keys] = {
        **{f"block {n}": {"depth": n} for n in blocks},
        **{f"lambda {w}": {"weight": w} for w in (0.1, 0.3)},
        **{f"head of {n}": {"head_layers": n} for n in (1, 2)},
        **{loss: {"loss": loss} for loss in ("l1", "l2", "cosine")},
        **{target: {"target": target} for target in ("mean", "velocity")},
        "t below 0.5": {"t_max": 0.5},
        "z-score": {"zscore": True},
        "early stop": {"schedule": "linear", "schedule_start": steps // 4},
        "cosine schedule": {"schedule": "cosine", "schedule_steps": steps},
    }
    own = {
        k: {f"align.vae.{key}": x for key, x in v.items()} for k, v in variants.items()
    }
    own["convolution"] = {"head": "convolution"}
    methods = {"SiT": SIT, "SRA 2": SRA2}
    methods |= {f"{k}, lognormal": v | LOGNORMAL for k, v in methods.items()}
    methods |= {f"SiT, {name}": SIT | network for name, network in networks.items()}
    return methods | {f"SRA 2, {name}": v for name, v in (networks | own).items()}
