"""What each alignment aims at, computed inside the jitted step, without gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array
from ml_collections import ConfigDict

from sra2_jax.alignment import EncoderAlignment, LatentAlignment, TeacherAlignment
from sra2_jax.models.dinov2 import DINOv2, patch_features
from sra2_jax.models.dit import DiT, patchify
from sra2_jax.state import build_alignments, build_networks

# (frozen parameters, draws) -> target tokens (B, T, d)
Target = Callable[[Mapping[str, Any], Mapping[str, Array]], Array]


def make_targets(config: ConfigDict, encoder: DINOv2 | None) -> dict[str, Target]:
    """The target of each alignment that is on, by name.

    `frozen` holds "teacher", the EMA of the network, and "encoder", the parameters of
    `encoder`, where they are wanted; `draws` comes from `training.step.make_draw`.
    """
    network, _ = build_networks(config)
    targets: dict[str, Target] = {}
    for name, spec in build_alignments(config).items():
        match spec:
            case LatentAlignment():
                targets[name] = _latent(spec, network)
            case EncoderAlignment(source="features"):
                targets[name] = lambda _, draws: draws["features"]
            case EncoderAlignment():
                assert encoder is not None
                targets[name] = _features(encoder, network)
            case TeacherAlignment():
                targets[name] = _teacher(spec, network)
    return targets


def _latent(spec: LatentAlignment, network: DiT) -> Target:
    """SRA 2: the clean latent in the token layout of the network's output."""
    return lambda _, draws: patchify(draws[f"latent_{spec.target}"], network.patch_size)


def _features(encoder: DINOv2, network: DiT) -> Target:
    """REPA: one patch feature for each of the network's tokens."""
    grid = network.size // network.patch_size
    encoder = encoder.clone(dtype=network.dtype)
    return lambda frozen, draws: patch_features(
        encoder, frozen["encoder"], draws["image"], grid
    )


def _teacher(spec: TeacherAlignment, network: DiT) -> Target:
    """SRA: block `teacher_depth` of the EMA network; the blocks after it never run.

    Its final layer is not asked for and compiled away.
    """
    depth = spec.teacher_depth
    apply: Any = network.clone(depth=depth, remat="none").apply

    def target(frozen: Mapping[str, Any], draws: Mapping[str, Array]) -> Array:
        params = dict(frozen["teacher"])
        params["blocks"] = jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])
        inputs = draws["x_teacher"], draws["t_teacher"], draws["y"]
        _, kept, _ = apply({"params": params}, *inputs, (depth,))
        return kept[depth]

    return target
