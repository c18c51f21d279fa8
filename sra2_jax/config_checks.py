"""What every configuration key may be, and which combinations cannot work.

No jax here: a mistake is found before anything slow is imported.
"""

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from sra2_jax.errors import UserError

COUNT = 2**31 - 1  # steps are counted in 32 bits
TINY = 1e-12

# key -> smallest and largest value; whole numbers where these are.
# align.*.KEY is a key of every section of config.align.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, COUNT),
    "steps": (1, COUNT),
    "batch_size": (1, 2**24),
    "data.resolution": (1, 2**14),
    "data.num_classes": (1, 10**7),
    "data.streams": (1, 2**16),
    "data.shuffle_buffer": (1, COUNT),
    "latents.size": (1, 2**12),
    "latents.channels": (1, 2**12),
    "latents.scaling_factor": (1e-6, 1e6),
    "latents.shift_factor": (-1e6, 1e6),
    "model.width": (4, 2**16),
    "model.depth": (1, 1000),
    "model.heads": (1, 2**12),
    "model.patch_size": (1, 2**12),
    "model.mlp_ratio": (0.1, 100.0),
    "model.time_scale": (1e-6, 1e6),
    "label_dropout": (0.0, 1.0),
    "transport.time_mean": (-100.0, 100.0),
    "transport.time_std": (1e-6, 100.0),
    "align.*.depth": (1, 1000),
    "align.*.weight": (0.0, 1e6),
    "align.*.schedule_start": (0, COUNT),
    "align.*.schedule_steps": (1, COUNT),
    "align.*.beta": (1e-9, 1e6),
    "align.*.t_min": (0.0, 1.0),
    "align.*.t_max": (0.0, 1.0),
    "align.*.head_layers": (1, 100),
    "align.*.head_width": (0, 2**17),
    "align.encoder.width": (1, 2**16),
    "align.teacher.teacher_depth": (1, 1000),
    "align.teacher.interval": (0.0, 1.0),
    "optim.learning_rate": (TINY, 100.0),
    "optim.warmup_steps": (0, COUNT),
    "optim.b1": (0.0, 1 - 1e-9),
    "optim.b2": (0.0, 1 - 1e-9),
    "optim.eps": (1e-30, 1.0),
    "optim.weight_decay": (0.0, 100.0),
    "optim.clip_norm": (1e-9, 1e9),
    "ema_decay": (0.0, 1 - 1e-9),
    "accumulate": (1, 2**20),
    "mesh.data": (-1, 2**20),
    "mesh.fsdp": (1, 2**20),
    "mesh.tensor": (1, 2**12),
    "sampling.steps": (2, 10**6),
    "sampling.guidance": (0.0, 1000.0),
    "sampling.guidance_low": (0.0, 1.0),
    "sampling.guidance_high": (0.0, 1.0),
    "sampling.guidance_channels": (0, 2**12),
    "sampling.batch_size": (1, 2**24),
    "run.log_every": (1, COUNT),
    "run.checkpoint_every": (1, COUNT),
    "run.keep_checkpoints": (1, COUNT),
    "run.keep_every": (0, COUNT),
    "run.keep_best": (0, COUNT),
    "run.sample_every": (1, COUNT),
    "run.most_skipped": (0, COUNT),
    "run.stall_seconds": (1, COUNT),
    "run.grid_classes": (1, 1000),
    "run.grid_columns": (1, 1000),
    "eval.every": (1, COUNT),
    "eval.num_samples": (2, 10**9),
}

# Written out, not imported, since the modules that use them import jax.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.remat": ("none", "dots", "attention", "full"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.dtype": ("bfloat16", "float32"),
    "transport.path": ("linear", "gvp", "vp"),
    "transport.prediction": ("velocity", "noise", "data"),
    "transport.time": ("uniform", "lognormal"),
    "align.*.schedule": ("constant", "linear", "cosine", "exponential"),
    "align.*.loss": ("smooth_l1", "l1", "l2", "cosine"),
    "align.vae.target": ("sample", "mean"),
    "align.encoder.source": ("images", "features"),
    "sampling.method": ("euler", "heun", "euler_maruyama"),
    "sampling.rounding": ("truncate", "sit"),
    "sampling.labels": ("random", "balanced"),
    "eval.features": ("", "digits", "inception"),
}

SWITCHES = (
    "model.learn_sigma",
    "model.scan",
    "align.*.enabled",
    "align.*.zscore",
    "align.*.head_final_layer",
)

# a model of the hub; no ".." may lead out of the folder of downloads
HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?"
)
SOME = r"[^\0\n]+", "must not be empty"
ANY = r"[^\0\n]*", "must be one line"
# key -> pattern of a text, and what is said of another
TEXTS: dict[str, tuple[str, str]] = {
    # a folder of runs/
    "name": (r"\w[\w.+-]*", "must be a name of letters, digits, '_', '.', '+' and '-'"),
    "vae": SOME,
    "data.dir": ANY,
    "data.images": ANY,
    "align.encoder.model": SOME,
    "eval.inception": ANY,
    "eval.reference": ANY,
}

ALIGNMENTS = ("vae", "encoder", "teacher")
# every key there is, "align.*" for all of its sections
KEYS = tuple(
    key.replace("*", section)
    for key in (*TEXTS, *RANGES, *CHOICES, *SWITCHES)
    for section in (ALIGNMENTS if "*" in key else ("",))
)


def flatten(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) for every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_key(key: str) -> UserError:
    """The error for a key that no config has, with the nearest one that exists."""
    key = key if len(key) <= 80 else f"{key[:77]}..."
    if inside := [k for k in KEYS if k.startswith(f"{key}.")]:
        return UserError(
            f"config.{key} is a section: set its keys, as config.{inside[0]}"
        )
    last = {k.rsplit(".", 1)[-1]: k for k in KEYS}
    near = difflib.get_close_matches(key, KEYS, 1) or [
        last[m]
        for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.5)
    ]
    hint = f"did you mean config.{near[0]}?" if near else "--keys lists them"
    return UserError(f"unknown key config.{key}: {hint}")


def check(config: ConfigDict) -> None:
    """Refuse keys missing or unknown, values of another type or out of range, and
    combinations that cannot work.

    Raises:
      UserError: the first key that is wrong, its value and what is allowed.
    """
    _check_values(config)
    _check_combinations(config)
    _check_parallelism(config)
    for name, section in config.align.items():
        if section.enabled:
            _check_alignment(f"config.align.{name}", section, config.model.depth)


def rule(table: dict[str, Any], key: str) -> Any:
    """What a table says of a key; None where it does not."""
    return table.get(key) or table.get(re.sub(r"^align\.\w+", "align.*", key))


def kind(key: str) -> type:
    """The type of a key's values."""
    if limits := rule(RANGES, key):
        return int if type(limits[0]) is int else float
    return str if rule(CHOICES, key) or key in TEXTS else bool


def allowed(key: str) -> str:
    """What a key's value must be, in words."""
    if limits := rule(RANGES, key):
        low, high = (f"{limit:.10g}" for limit in limits)
        whole = "a whole number" if kind(key) is int else "a number"
        return f"must lie between {low} and {high}, {whole}"
    if choices := rule(CHOICES, key):
        return f"must be one of {', '.join(map(repr, choices))}"
    return TEXTS[key][1] if key in TEXTS else "must be true or false"


def fits(key: str, value: Any) -> bool:
    """Whether a key may have a value, others aside; a whole number is a number too."""
    wanted = kind(key)
    if wanted is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not wanted:
        return False
    if limits := rule(RANGES, key):
        return limits[0] <= value <= limits[1]  # also refuses NaN
    if choices := rule(CHOICES, key):
        return value in choices
    return key not in TEXTS or bool(re.fullmatch(TEXTS[key][0], str(value)))


def shown(value: Any) -> str:
    """A value, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_values(config: ConfigDict) -> None:
    flat = dict(flatten(config))
    for key in flat:
        if key not in KEYS:
            raise unknown_key(key)
    for key in KEYS:
        if key not in flat:
            raise UserError(f"config.{key} is missing: see configs/default.py")
        if not fits(key, flat[key]):
            raise UserError(f"config.{key}={shown(flat[key])}: {allowed(key)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_combinations(config: ConfigDict) -> None:
    model, run, sampling = config.model, config.run, config.sampling
    _require(
        config.latents.size % model.patch_size == 0,
        f"config.model.patch_size={model.patch_size} does not divide "
        f"config.latents.size={config.latents.size}",
    )
    _require(
        model.width % model.heads == 0 and model.width % 4 == 0,
        f"config.model.width={model.width} must be divisible by 4 and by "
        f"config.model.heads={model.heads}",
    )
    _require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        "config.model.attention='cudnn' needs config.model.dtype='bfloat16'",
    )
    _require(
        run.checkpoint_every % run.log_every == 0,
        f"config.run.checkpoint_every={run.checkpoint_every} must be a multiple "
        f"of config.run.log_every={run.log_every}, so that a resumed run logs "
        "the same rows",
    )
    _require(
        run.keep_every % run.checkpoint_every == 0,
        f"config.run.keep_every={run.keep_every} must be 0 or a multiple of "
        f"config.run.checkpoint_every={run.checkpoint_every}: others are never saved",
    )
    _require(
        sampling.guidance_channels <= config.latents.channels,
        f"config.sampling.guidance_channels={sampling.guidance_channels} "
        f"exceeds config.latents.channels={config.latents.channels}",
    )
    _require(
        sampling.guidance_low <= sampling.guidance_high,
        f"config.sampling.guidance_low={sampling.guidance_low} must not exceed "
        f"config.sampling.guidance_high={sampling.guidance_high}",
    )
    if config.eval.features == "digits":
        _require(
            config.data.num_classes == 10 and config.data.resolution == 32,
            "config.eval.features='digits' needs config.data.num_classes=10 and "
            "config.data.resolution=32",
        )
    if config.eval.features == "inception":
        _require(
            bool(config.eval.reference),
            "config.eval.features='inception' needs config.eval.reference, an .npz in "
            "ADM's format (docs/evaluation.md)",
        )


def _check_parallelism(config: ConfigDict) -> None:
    """What a batch and the heads are divided by. The number of devices is not known."""
    mesh, batch = config.mesh, config.batch_size
    _require(mesh.data != 0, "config.mesh.data=0: must be -1 or at least 1")
    for key, parts in (
        ("accumulate", config.accumulate),
        ("data.streams", config.data.streams),
        ("mesh.data", abs(mesh.data)),
        ("mesh.fsdp", mesh.fsdp),
    ):
        _require(
            batch % parts == 0,
            f"config.batch_size={batch} is not divisible by config.{key}={parts}",
        )
    rows = abs(mesh.data) * mesh.fsdp * config.accumulate
    _require(
        batch % rows == 0,
        f"config.batch_size={batch} is not divisible by {rows}, config.mesh.data x "
        "config.mesh.fsdp x config.accumulate",
    )
    _require(
        config.model.heads % mesh.tensor == 0,
        f"config.mesh.tensor={mesh.tensor} does not divide "
        f"config.model.heads={config.model.heads}",
    )


def _check_alignment(name: str, section: ConfigDict, depth: int) -> None:
    for key in ("depth", "teacher_depth"):
        if section.get(key, 1) > depth:
            raise UserError(
                f"{name}.{key}={section[key]}: the network has "
                f"config.model.depth={depth} blocks"
            )
    if section.t_min >= section.t_max:
        raise UserError(
            f"{name}.t_min={section.t_min} must be below {name}.t_max={section.t_max}"
        )
