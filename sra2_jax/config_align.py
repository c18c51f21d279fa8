"""The keys of the alignments: the section config.align, see config.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sra2_jax.section import SOME, Section, key, other

STEPS = 2**31 - 1  # counted in 32 bits
EPOCH = 5004  # steps of 256 images in ImageNet
Loss = Literal["smooth_l1", "l1", "l2", "cosine", "cosine_tokens"]
Schedule = Literal["constant", "linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Alignment(Section):
    """The keys that every alignment has."""

    enabled: bool = key(False, "whether this alignment trains")
    depth: int = key(8, "aligned block, 1-based", 1, 1000)
    weight: float = key(1.0, "of the loss, lambda", 0, 1e6)
    schedule: Schedule = key("constant", "of the weight")
    schedule_start: int = key(0, "step at which the weight begins to fall", 0, STEPS)
    schedule_steps: int = key(1, "of the fall to 0, or tenfold", 1, STEPS)
    loss: Loss = key("smooth_l1", "between prediction and target")
    beta: float = key(0.05, "of smooth_l1", 1e-9, 1e6)
    zscore: bool = key(False, "standardise both sides per sample")
    t_min: float = key(0.0, "times aligned, 0 = data", 0, 1)
    t_max: float = key(1.0, "times aligned, 1 = noise", 0, 1)

    def conflicts(self) -> Iterator[str]:
        if self.enabled and self.t_min >= self.t_max:
            yield f"{self.given('t_min')} must be below {self.given('t_max')}"


@dataclass(frozen=True)
class MLPAlignment(Alignment):
    """One whose head are linear layers."""

    head_layers: int = key(3, "linear layers of the head", 1, 100)
    head_width: int = key(0, "its hidden channels; 0 = twice the model's", 0, 2**17)
    head_final_layer: bool = key(False, "end in a layer like DiT's final one")


@dataclass(frozen=True)
class AlignVAE(MLPAlignment, where="align.vae"):
    """SRA 2: the clean latent."""

    enabled: bool = other(Alignment, "enabled", True)
    head_layers: int = other(MLPAlignment, "head_layers", 5)
    target: Literal["sample", "mean", "velocity"] = key(
        "sample", "the latent x_t is built from, its mean, or dx_t/dt (IG)"
    )


@dataclass(frozen=True)
class EncoderKeys(Alignment):
    """The keys of those that aim at an encoder's patch features of the image."""

    loss: Loss = other(Alignment, "loss", "cosine")
    model: str = key(
        "facebook/dinov2-base", 'folder, hub id, or "digits"', pattern=SOME
    )
    width: int = key(768, "of the encoder's tokens", 1, 2**16)
    source: Literal["images", "features"] = key("images", "run in the step, or stored")


@dataclass(frozen=True)
class AlignEncoder(EncoderKeys, MLPAlignment, where="align.encoder"):
    """REPA."""

    weight: float = other(Alignment, "weight", 0.5)
    head_width: int = other(MLPAlignment, "head_width", 2048)


@dataclass(frozen=True)
class AlignIREPA(EncoderKeys, where="align.irepa"):
    """iREPA."""


@dataclass(frozen=True)
class AlignTeacher(MLPAlignment, where="align.teacher"):
    """SRA: a later block of the EMA network, at a lower noise level."""

    weight: float = other(Alignment, "weight", 0.2)
    schedule: Schedule = other(Alignment, "schedule", "exponential")
    schedule_start: int = other(Alignment, "schedule_start", 149 * EPOCH)
    schedule_steps: int = other(Alignment, "schedule_steps", 1000 * EPOCH)
    head_layers: int = other(MLPAlignment, "head_layers", 2)
    teacher_depth: int = key(20, "the teacher's block, 1-based", 1, 1000)
    interval: float = key(0.2, "teacher's t = clamp(t - interval U(0, 1), 0, 1)", 0, 1)


@dataclass(frozen=True)
class Align(Section, where="align"):
    vae: AlignVAE = AlignVAE()
    encoder: AlignEncoder = AlignEncoder()
    irepa: AlignIREPA = AlignIREPA()
    teacher: AlignTeacher = AlignTeacher()
