"""The first steps of a run, against those of another machine: sra2 verify --steps.

SRA 2 on SiT-B/2 in float32, on latents made here from a seed. assets/steps/sra2_b.jsonl
holds what they were on a CPU; `python -m tools.first_steps` writes it.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from sra2_jax import config_file, sharding
from sra2_jax.config import Config
from sra2_jax.step import Program

RECORDED = Path(__file__).parents[1] / "assets" / "steps" / "sra2_b.jsonl"
CONFIG = "sra2_b"
# 64 tokens and 2 images a step, so that a CPU is done within minutes.
CHANGES = {
    "data.resolution": 128, "latents.size": 16, "batch_size": 2,
    "model.dtype": "float32", "model.attention": "xla", "model.scan": True,
    "model.remat": "none",
}  # fmt: skip
COMPARED = "loss_denoise", "loss_align_vae", "grad_norm"
CLASSES = 10
# Rounding differs between machines, and training doubles a difference now and then:
# up to a step, the relative error that is no more than that.
BANDS = {10: 1e-4, 100: 1e-3}


def synthetic(config: Config, step: int) -> dict[str, np.ndarray]:
    """A batch of made-up latents, each its class's pattern and noise of its own, about
    as large as those of SD's VAE: mean, std (B, h, w, c) float16, label (B,) int32."""
    shape = config.latent_shape
    patterns = np.random.RandomState(0).randn(CLASSES, *shape)
    draw = np.random.RandomState(1 + step)
    label = draw.randint(CLASSES, size=config.batch_size)
    mean = 0.8 * patterns[label] + 0.6 * draw.randn(config.batch_size, *shape)
    mean = (mean / config.latents.scaling_factor).astype(np.float16)
    std = np.full(mean.shape, 0.1, np.float16)
    return {"mean": mean, "std": std, "label": label.astype(np.int32)}


def first_steps() -> Iterator[dict[str, float]]:
    """What COMPARED names, of one step after the other.

    On as many of the devices as the batch can be split over.
    """
    config = config_file.load(CONFIG).override(CHANGES)
    count = math.gcd(jax.device_count(), config.batch_size)
    program = Program(config, sharding.make_mesh(devices=jax.devices()[:count]))
    with jax.default_matmul_precision("highest"):
        state, update = program.start(), program.compile()
    place = sharding.batch_sharding(program.mesh)
    for step in itertools.count():
        batch = jax.device_put(synthetic(config, step), place)
        state, metrics = update(state, batch)
        yield {name: float(metrics[name]) for name in COMPARED}


def verify_steps(count: int, recorded: Path = RECORDED) -> int:
    """Train, print the largest relative error of each band; return the exit status."""
    rows = [json.loads(line) for line in recorded.read_text().splitlines()[:count]]
    errors = []
    for step, (row, ours) in enumerate(zip(rows, first_steps(), strict=False)):
        errors.append(max(abs(ours[k] / row[k] - 1) for k in COMPARED))
        if step in (0, len(rows) - 1) or step % 100 == 99:
            print(f"step {step + 1}: {ours}", flush=True)
    passed, start = [], 0
    for end, allowed in BANDS.items():
        if band := errors[start:end]:
            found = float(np.max(band))  # NaN if one is
            passed.append(found <= allowed)
            verdict = "ok" if passed[-1] else "FAILED"
            last = start + len(band)
            print(
                f"steps {start + 1} to {last}: {found:.1e} (<= {allowed:.0e}) {verdict}"
            )
        start = end
    return int(not all(passed))
