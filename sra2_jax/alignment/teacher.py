"""SRA (arXiv 2505.02831): a later block of the EMA network at a lower noise level."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sra2_jax import config_align
from sra2_jax.alignment.base import Arrays, MLPAlignment
from sra2_jax.models import apply
from sra2_jax.models.dit import DiT


class TeacherAlignment(config_align.AlignTeacher, MLPAlignment):
    """Block `teacher_depth` of the EMA network; the blocks after it never run.

    It sees the same sample, noise and dropped label at clamp(t - interval u, 0, 1), u
    uniform in [0, 1) for each sample.
    """

    title = "SRA"
    aim = "a later block of its moving average"
    reference = "ap_head"
    reference_linear = "linear{next}"

    def features(self, network: DiT) -> int:
        return network.model.width

    def draw(self, key: Array, clean: Arrays, transport: Any) -> dict[str, Array]:
        t = clean["t"] - self.interval * jax.random.uniform(key, clean["t"].shape)
        t = jnp.clip(t, 0.0, 1.0)
        x, _ = transport.interpolate(clean["z"], clean["noise"], t)
        return {"t_teacher": t, "x_teacher": x}

    def compute_target(
        self, network: DiT, frozen: Any, ema: Any, draws: Arrays
    ) -> Array:
        # What comes after the block is not asked for and compiled away.
        depth = min(self.teacher_depth + network.apart, network.model.depth)
        stack, params = depth - network.apart, dict(ema)
        params["blocks"] = jax.tree.map(lambda leaf: leaf[:stack], params["blocks"])
        inputs = draws["x_teacher"], draws["t_teacher"], draws["y"]
        model = replace(network.model, depth=depth, remat="none")
        wanted = (self.teacher_depth,)
        _, kept, _ = apply(network.clone(model=model), params, *inputs, wanted)
        return kept[self.teacher_depth]

    def macs(self, network: DiT) -> int:
        return network.macs(self.teacher_depth, final=False)
