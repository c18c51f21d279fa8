"""Every key of a run, once: its type, default, meaning, range, and whether a resumed
run may change it.

A section checks itself when it is made. The class that does its work subclasses it
(`transport.Transport`), so that no default is written twice. A config file, as those in
configs/, returns `config_file.default()` with what differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from sra2_jax.config_align import STEPS, Align, EncoderKeys
from sra2_jax.section import NAME, NUMBERS, SOME, Section, free, key

# Collections that pip packages bring (data/digits.py), and what is shipped for them.
DIGITS = "digits", "mnist"
CAPTIONS = 5  # of an image; one is drawn a step
WORDS = "words"  # the text encoder that is shipped, to be trained along


@dataclass(frozen=True)
class Data(Section, where="data"):
    dir: str = free("", 'latents dataset; "" = WORKDIR/latents')
    images: str = free("", "encode these if data.dir is missing, see `sra2 encode`")
    resolution: int = key(256, "side of the images, pixels", 1, 2**14)
    num_classes: int = key(1000, "labels, without the null label", 1, 10**7)
    shuffle_buffer: int = key(16384, "records to mix, see `data.order`", 1, STEPS)


@dataclass(frozen=True)
class Latents(Section, where="latents"):
    size: int = key(32, "side of the latent grid", 1, 2**12)
    channels: int = key(4, "channels of a latent", 1, 2**12)
    scaling_factor: float = key(0.18215, "latent = scaling * (raw - shift)", 1e-6, 1e6)
    shift_factor: float = key(0.0, "see scaling_factor", -1e6, 1e6)
    mean: NUMBERS = key((), "of each channel; raw is (raw - mean) / std", -1e6, 1e6)
    std: NUMBERS = key((), "see mean; the dataset's where both are empty", 1e-6, 1e6)

    def conflicts(self) -> Iterator[str]:
        if {len(self.mean), len(self.std)} not in ({0}, {self.channels}):
            std, mean = self.given("std"), self.given("mean")
            yield f"{std}, {mean}: {self.channels} numbers are wanted, or none"

    @property
    def scale(self) -> Any:
        """latent = scale * (raw - shift): numbers, or arrays (channels,)."""
        std = np.array(self.std, np.float32)
        return self.scaling_factor / std if self.std else self.scaling_factor

    @property
    def shift(self) -> Any:
        mean = np.array(self.mean, np.float32)
        return self.shift_factor + mean if self.mean else self.shift_factor


@dataclass(frozen=True)
class Model(Section, where="model"):
    width: int = key(1152, "channels of a token", 4, 2**16)
    depth: int = key(28, "blocks", 1, 1000)
    heads: int = key(16, "attention heads", 1, 2**12)
    patch_size: int = key(2, "side of a token's patch of the latent", 1, 2**12)
    mlp_ratio: float = key(4.0, "hidden channels over width", 0.1, 100)
    norm: Literal["layer", "rms"] = key("layer", "of blocks; rms has a weight")
    qk_norm: Literal["none", "rms", "layer"] = key(
        "none", "of each head's queries and keys"
    )
    mlp: Literal["gelu", "swiglu"] = key("gelu", "swiglu: of 2/3 the hidden channels")
    rope: bool = key(False, "rotate queries and keys by row and column")
    shift: bool = key(True, "adaLN shifts, too")
    time_scale: float = key(1.0, "factor on t in [0, 1] before its features", 1e-6, 1e6)
    learn_sigma: bool = key(False, "a second half of the output that nothing uses")
    scan: bool = free(True, "blocks as a loop, or unrolled")
    remat: Literal["none", "dots", "attention", "full"] = free(
        "dots", "what the backward pass computes again"
    )
    attention: Literal["auto", "xla", "cudnn"] = free(
        "auto", "auto: cudnn on GPUs where it works"
    )
    dtype: Literal["bfloat16", "float32"] = free("bfloat16", "compute type")

    def conflicts(self) -> Iterator[str]:
        if self.width % self.heads or self.width % 4:
            width, heads = self.given("width"), self.given("heads")
            yield f"{width} must be divisible by 4 and by {heads}"
        if self.rope and self.width // self.heads % 4:
            yield f"{self.given('rope')}: width / heads must be divisible by 4"
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            yield f"{self.given('attention')} needs config.model.dtype='bfloat16'"


@dataclass(frozen=True)
class Text(Section, where="text"):
    """Captions in place of labels; the network is MMDiT."""

    encoder: str = key(
        "", 'CLIP\'s, whose text half reads captions: folder or hub id; "" = labels'
    )
    train: bool = key(False, "train it along, from random weights")
    prompts: str = free("", "of a sample grid's rows, ';' between; else the dataset's")


@dataclass(frozen=True)
class Transport(Section, where="transport"):
    path: Literal["linear", "gvp", "vp"] = key("linear", "from data to noise")
    prediction: Literal["velocity", "noise", "data"] = key(
        "velocity", "the network's output"
    )
    time: Literal["uniform", "lognormal"] = key("uniform", "density of training times")
    time_mean: float = key(0.0, "of log(sigma / alpha), lognormal only", -100, 100)
    time_std: float = key(1.0, "see time_mean", 1e-6, 100)
    time_shift: float = key(1.0, "s: all times become s t / (1 + (s - 1) t)", 1e-3, 1e3)


@dataclass(frozen=True)
class Optim(Section, where="optim"):
    """Behind a clip."""

    name: Literal["adamw", "muon"] = key("adamw", "Muon: for hidden matrices alone")
    learning_rate: float = key(1e-4, "after the warm-up", 1e-12, 100)
    warmup_steps: int = key(0, "linear warm-up", 0, STEPS)
    decay: Literal["none", "linear", "cosine"] = free("none", "of the rate, to 0")
    decay_start: int = free(0, "step at which it begins", 0, STEPS)
    decay_steps: int = free(1, "its length", 1, STEPS)
    b1: float = key(0.9, "of Adam", 0, 1 - 1e-9)
    b2: float = key(0.999, "of Adam", 0, 1 - 1e-9)
    eps: float = key(1e-8, "of Adam", 1e-30, 1)
    weight_decay: float = key(0.0, "decoupled", 0, 100)
    clip_norm: float = key(1.0, "largest global norm of the gradients", 1e-9, 1e9)


@dataclass(frozen=True)
class Mesh(Section, where="mesh"):
    data: int = free(-1, "devices with copies of the state; -1 = the rest", -1, 2**20)
    fsdp: int = free(1, "devices that share one copy", 1, 2**20)
    tensor: int = free(1, "devices that share a layer's heads and hidden", 1, 2**12)

    def conflicts(self) -> Iterator[str]:
        if not self.data:
            yield "config.mesh.data=0: must be -1 or at least 1"


@dataclass(frozen=True)
class Sampling(Section, where="sampling"):
    method: Literal["euler", "heun", "euler_maruyama"] = free(
        "euler_maruyama", "ODE, ODE, SDE"
    )
    steps: int = free(250, "of a trajectory", 2, 10**6)
    guidance: float = free(1.0, "scale of classifier-free guidance; 1 = off", 0, 1000)
    guidance_low: float = free(0.0, "guided where low <= t <= high", 0, 1)
    guidance_high: float = free(1.0, "see guidance_low", 0, 1)
    guidance_channels: int = free(0, "guide the first channels; 0 = all", 0, 2**12)
    head_guidance: float = free(
        1.0, "scale of guidance by align.vae's head; 1 = off", 0, 1000
    )
    head_guidance_low: float = free(0.0, "so guided where low <= t <= high", 0, 1)
    head_guidance_high: float = free(1.0, "see head_guidance_low", 0, 1)
    rounding: Literal["truncate", "sit"] = free("truncate", "to uint8, as REPA or SiT")
    labels: Literal["random", "balanced"] = free(
        "random", "of scored samples; or i mod classes"
    )
    batch_size: int = free(64, "images at a time, over all devices", 1, 2**24)
    dtype: Literal["float32", "bfloat16"] = free(
        "float32", "of the network, as SiT and REPA sample"
    )

    def conflicts(self) -> Iterator[str]:
        for name in ("guidance", "head_guidance"):
            low, high = f"{name}_low", f"{name}_high"
            if getattr(self, low) > getattr(self, high):
                yield f"{self.given(low)} must not exceed {self.given(high)}"


@dataclass(frozen=True)
class Run(Section, where="run"):
    log_every: int = free(100, "steps", 1, STEPS)
    checkpoint_every: int = free(10_000, "steps", 1, STEPS)
    keep_checkpoints: int = free(3, "the newest", 1, STEPS)
    keep_every: int = free(0, "and those of every so many steps; 0 = none", 0, STEPS)
    keep_best: int = free(1, "and those with the best Fréchet distance", 0, STEPS)
    sample_every: int = free(50_000, "steps", 1, STEPS)
    most_skipped: int = free(10, "updates in a row that are not finite", 0, STEPS)
    stall_seconds: int = free(1800, "without progress until it ends itself", 1, STEPS)
    grid_classes: int = free(8, "rows of a sample grid, spread over classes", 1, 1000)
    grid_columns: int = free(8, "images of a class in a sample grid", 1, 1000)
    profile_steps: str = free(
        "",
        'write a trace of these steps, as "100:110", into profile/',
        pattern=(r"([1-9]\d{0,9}:[1-9]\d{0,9})?", 'must be "" or FIRST:LAST'),
    )
    clu: bool = free(False, "TensorBoard through clu, which imports TensorFlow")

    def conflicts(self) -> Iterator[str]:
        if self.checkpoint_every % self.log_every:
            saved, logged = self.given("checkpoint_every"), self.given("log_every")
            yield f"{saved} must be a multiple of {logged}: resumed rows would differ"
        if self.keep_every % self.checkpoint_every:
            kept, saved = self.given("keep_every"), self.given("checkpoint_every")
            yield f"{kept} must be 0 or a multiple of {saved}"


@dataclass(frozen=True)
class Eval(Section, where="eval"):
    features: Literal["", "mnist", "digits", "inception", "dinov2"] = free(
        "", "score samples: FID or FD-DINOv2, KID; of digits proxies; '' = never"
    )
    inception: str = free("inception.safetensors", "weights, see docs/evaluation.md")
    dinov2: str = free("facebook/dinov2-large", "weights: folder or hub id")
    reference: str = free("", "of inception, dinov2: an .npz in ADM's format")
    every: int = free(50_000, "steps", 1, STEPS)
    num_samples: int = free(10_000, "scored samples", 2, 10**9)

    def conflicts(self) -> Iterator[str]:
        if self.features in ("inception", "dinov2") and not self.reference:
            yield f"{self.given('features')} needs config.eval.reference, an .npz"


@dataclass(frozen=True)
class Config(Section):
    """A run. The defaults are the paper's SRA 2 at XL/2, 256 px (arXiv 2601.17830)."""

    name: str = free("sra2_xl", "of the run, and of its folder in runs/", pattern=NAME)
    seed: int = key(0, "of parameters, order and all randomness", 0, STEPS)
    steps: int = free(4_000_000, "optimizer steps of the whole run", 1, STEPS)
    batch_size: int = key(256, "images a step, over all devices and hosts", 1, 2**24)
    accumulate: int = free(1, "micro-batches a step", 1, 2**20)
    label_dropout: float = key(0.1, "share of labels replaced by the null label", 0, 1)
    ema_decay: float = key(0.9999, "from step 0", 0, 1 - 1e-9)
    ema_others: NUMBERS = key((), "decays of more averages, to sample", 0, 1 - 1e-9)
    vae: str = free(
        "stabilityai/sd-vae-ft-ema",
        'diffusers folder, hub id, "mnist" or "digits"',
        pattern=SOME,
    )
    data: Data = Data()
    latents: Latents = Latents()
    model: Model = Model()
    text: Text = Text()
    transport: Transport = Transport()
    align: Align = Align()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    sampling: Sampling = Sampling()
    run: Run = Run()
    eval: Eval = Eval()

    @property
    def grid(self) -> int:
        """Tokens on a side."""
        return self.latents.size // self.model.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        return self.latents.size, self.latents.size, self.latents.channels

    def feature_readers(self) -> dict[str, EncoderKeys]:
        """The alignments that read stored features, by name."""
        on = {name: s for name, s in vars(self.align).items() if s.enabled}
        return {n: s for n, s in on.items() if getattr(s, "source", "") == "features"}

    def conflicts(self) -> Iterator[str]:
        for whole, part in (
            ("latents.size", "model.patch_size"),
            ("model.heads", "mesh.tensor"),
            ("batch_size", "accumulate"),
            ("batch_size", "mesh.fsdp"),
        ):
            if attrgetter(whole)(self) % attrgetter(part)(self):
                yield f"{self.given(whole)} is not divisible by {self.given(part)}"
        # The number of devices is not known here.
        rows = abs(self.mesh.data) * self.mesh.fsdp * self.accumulate
        if self.batch_size % rows:
            yield (
                f"{self.given('batch_size')} is not divisible by config.mesh.data x "
                f"config.mesh.fsdp x config.accumulate = {rows}"
            )
        if self.sampling.guidance_channels > self.latents.channels:
            guided = self.given("sampling.guidance_channels")
            yield f"{guided} exceeds {self.given('latents.channels')}"
        if self.text.encoder and self.eval.features in DIGITS:
            yield f"{self.given('eval.features')}: captions name no digits"
        if self.text.encoder == WORDS and not self.text.train:
            yield f"{self.text.given('encoder')} needs config.text.train: no weights"
        if self.text.encoder and self.model.depth < 2:
            yield f"{self.given('model.depth')}: MMDiT has two blocks or more"
        vae = self.align.vae
        scaled = vae.enabled and not vae.zscore and not vae.loss.startswith("cosine")
        if self.sampling.head_guidance != 1 and not scaled:
            guided = self.given("sampling.head_guidance")
            yield f"{guided} needs config.align.vae on, zscore off, loss not cosine"
        digits = (self.data.num_classes, self.data.resolution) == (10, 32)
        if self.eval.features in DIGITS and not digits:
            yield (
                f"{self.given('eval.features')} needs config.data.num_classes=10 and "
                "config.data.resolution=32"
            )
        for section in vars(self.align).values():
            for block in ("depth", "teacher_depth"):
                if section.enabled and getattr(section, block, 1) > self.model.depth:
                    depth = self.given("model.depth")
                    yield f"{section.given(block)}: the network has {depth} blocks"
