"""Reading and checking configurations: every mistake is one clear line, early."""

import argparse
import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from sra2_jax import alignment, attention, sampler, transport
from sra2_jax.errors import UserError
from sra2_jax.models.dit import REMAT_POLICIES

INF = math.inf

# key -> smallest and largest value allowed; every numeric key of configs/default.py.
# align.*.KEY is a key of every section of config.align.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "steps": (1, INF),
    "batch_size": (1, INF),
    "data.resolution": (1, INF),
    "data.num_classes": (1, INF),
    "data.streams": (1, INF),
    "data.shuffle_buffer": (1, INF),
    "latents.size": (1, INF),
    "latents.channels": (1, INF),
    "latents.scaling_factor": (1e-6, 1e6),
    "latents.shift_factor": (-1e6, 1e6),
    "model.width": (4, INF),
    "model.depth": (1, INF),
    "model.heads": (1, INF),
    "model.patch_size": (1, INF),
    "model.mlp_ratio": (0.1, 100),
    "model.time_scale": (1e-6, 1e6),
    "label_dropout": (0, 1),
    "transport.time_mean": (-100, 100),
    "transport.time_std": (1e-6, 100),
    "align.*.depth": (1, INF),
    "align.*.weight": (0, 1e6),
    "align.*.schedule_start": (0, INF),
    "align.*.schedule_steps": (1, INF),
    "align.*.beta": (1e-9, 1e6),
    "align.*.t_min": (0, 1),
    "align.*.t_max": (0, 1),
    "align.*.head_layers": (1, 100),
    "align.*.head_width": (0, INF),
    "align.encoder.width": (1, INF),
    "align.teacher.teacher_depth": (1, INF),
    "align.teacher.interval": (0, 1),
    "optim.learning_rate": (0, 100),
    "optim.warmup_steps": (0, INF),
    "optim.b1": (0, 1 - 1e-9),
    "optim.b2": (0, 1 - 1e-9),
    "optim.eps": (1e-30, 1),
    "optim.weight_decay": (0, 100),
    "optim.clip_norm": (1e-9, 1e9),
    "ema_decay": (0, 1 - 1e-9),
    "accumulate": (1, INF),
    "mesh.data": (-1, INF),
    "mesh.fsdp": (1, INF),
    "mesh.tensor": (1, INF),
    "sampling.steps": (2, INF),
    "sampling.guidance": (0, 1000),
    "sampling.guidance_low": (0, 1),
    "sampling.guidance_high": (0, 1),
    "sampling.guidance_channels": (0, INF),
    "sampling.batch_size": (1, INF),
    "run.log_every": (1, INF),
    "run.checkpoint_every": (1, INF),
    "run.keep_checkpoints": (1, INF),
    "run.keep_every": (0, INF),
    "run.keep_best": (0, INF),
    "run.sample_every": (1, INF),
    "run.most_skipped": (0, INF),
    "run.stall_seconds": (1, INF),
    "run.grid_classes": (1, INF),
    "run.grid_columns": (1, INF),
    "eval.every": (1, INF),
    "eval.num_samples": (2, INF),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "model.remat": tuple(REMAT_POLICIES),
    "model.attention": attention.CHOICES,
    "model.dtype": ("bfloat16", "float32"),
    "transport.path": transport.PATHS,
    "transport.prediction": transport.PREDICTIONS,
    "transport.time": transport.TIMES,
    "align.*.schedule": alignment.SCHEDULES,
    "align.*.loss": alignment.LOSSES,
    "align.vae.target": alignment.TARGETS,
    "align.encoder.source": alignment.SOURCES,
    "sampling.method": sampler.SAMPLERS,
    "sampling.rounding": ("truncate", "sit"),
    "sampling.labels": ("random", "balanced"),
    "eval.features": ("", "digits", "inception"),
}


def flatten(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) for every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_key(key: str, config: ConfigDict) -> UserError:
    """The error for a key that no config has, with the nearest one that exists."""
    keys = [k for k, _ in flatten(config)]
    if inside := [k for k in keys if k.startswith(f"{key}.")]:
        return UserError(
            f"config.{key} is a section: set its keys, as config.{inside[0]}"
        )
    last = {k.rsplit(".", 1)[-1]: k for k in keys}
    near = difflib.get_close_matches(key, keys, 1) or [
        last[m]
        for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.5)
    ]
    hint = f"did you mean config.{near[0]}?" if near else "see configs/default.py"
    return UserError(f"unknown key config.{key}: {hint}")


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, with overrides "--config.KEY=VALUE" applied; not checked.

    Raises:
      UserError: no such file, an unknown key, a value of another type.
    """
    arguments = [f"--config={path}", *overrides]
    try:
        return _parse(config_flags.DEFINE_config_file, arguments)
    except OSError as error:
        raise UserError(f"--config={path} names no file: see configs/") from error


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of a config with "--config.KEY=VALUE" applied; not checked.

    Raises:
      UserError: an unknown key, a value of another type.
    """
    define = functools.partial(
        config_flags.DEFINE_config_dict, config=config.copy_and_resolve_references()
    )
    return _parse(define, overrides)


def _parse(define: Callable[..., Any], overrides: Sequence[str]) -> ConfigDict:
    """The config of a flag that `define` makes, with overrides applied."""
    arguments = ["", *overrides]
    values = flags.FlagValues()
    try:
        define(name="config", flag_values=values, sys_argv=arguments)
        rest = values(arguments)[1:]
        config: ConfigDict = values.config.lock()
    except OSError:
        raise
    except Exception as error:  # ml_collections raises many kinds
        from configs import default

        known = default.get_config()
        keys = dict(flatten(known))
        for argument in overrides:
            section, _, key = argument.lstrip("-").split("=")[0].partition(".")
            if section == "config" and key and key not in keys:
                raise unknown_key(key, known) from error
        reason = " ".join(str(error).split())
        raise UserError(f"{reason} (--help lists the flags)") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags begin with --")
    return config


def parse_arguments(
    parser: argparse.ArgumentParser, default: str
) -> tuple[argparse.Namespace, ConfigDict]:
    """A program's own flags, and the checked config of --config and --config.KEY=VALUE.

    Args:
      parser: made with allow_abbrev=False; gets the flag --config.
      default: the config file where none is named.

    Raises:
      UserError: as `load` and `check`.
    """
    parser.add_argument("--config", default=default, help="file (%(default)s)")
    parser.epilog = "Any key of configs/default.py: --config.KEY=VALUE"
    arguments, rest = parser.parse_known_args()
    config = load(arguments.config, rest)
    check(config)
    return arguments, config


def from_saved(saved: dict[str, Any], where: str) -> ConfigDict:
    """The config of a run's config.json.

    Raises:
      UserError: it is not one that this version wrote.
    """
    keys = [k for k in (*RANGES, *CHOICES) if "*" not in k]
    flat = dict(flatten(saved)) if isinstance(saved, dict) else {}
    if missing := [k for k in keys if k not in flat]:
        raise UserError(
            f"{where}: has no config.{missing[0]}: written by another version, or not "
            "by this program"
        )
    config = ConfigDict(saved).lock()
    check(config)
    return config


def check(config: ConfigDict) -> None:
    """Refuse values out of range and combinations that cannot work.

    Raises:
      UserError: the first key that is wrong, its value and what is allowed.
    """
    _check_values(config)
    _check_combinations(config)


def rule(table: dict[str, Any], key: str) -> Any:
    """What RANGES or CHOICES say of a key; None where they do not."""
    return table.get(key) or table.get(re.sub(r"^align\.\w+", "align.*", key))


def _check_values(config: ConfigDict) -> None:
    for key, value in flatten(config):
        choices, limits = rule(CHOICES, key), rule(RANGES, key)
        if choices and value not in choices:
            allowed = ", ".join(repr(v) for v in choices)
            raise UserError(f"config.{key}={value!r}: must be one of {allowed}")
        if limits:
            low, high = limits
            if not low <= value <= high:  # also refuses NaN
                raise UserError(
                    f"config.{key}={value}: must lie between {low:g} and {high:g}"
                )


def _check_combinations(config: ConfigDict) -> None:
    model = config.model

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(
        config.latents.size % model.patch_size == 0,
        f"config.model.patch_size={model.patch_size} does not divide "
        f"config.latents.size={config.latents.size}",
    )
    require(
        model.width % model.heads == 0 and model.width % 4 == 0,
        f"config.model.width={model.width} must be divisible by 4 and by "
        f"config.model.heads={model.heads}",
    )
    require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        "config.model.attention='cudnn' needs config.model.dtype='bfloat16'",
    )
    require(
        config.batch_size % config.accumulate == 0,
        f"config.batch_size={config.batch_size} is not divisible by "
        f"config.accumulate={config.accumulate}",
    )
    require(
        config.batch_size % config.data.streams == 0,
        f"config.batch_size={config.batch_size} is not divisible by "
        f"config.data.streams={config.data.streams}",
    )
    require(
        config.run.checkpoint_every % config.run.log_every == 0,
        f"config.run.checkpoint_every={config.run.checkpoint_every} must be a multiple "
        f"of config.run.log_every={config.run.log_every}, so that a resumed run logs "
        "the same rows",
    )
    require(config.mesh.data != 0, "config.mesh.data=0: must be -1 or at least 1")
    require(
        model.heads % config.mesh.tensor == 0,
        f"config.mesh.tensor={config.mesh.tensor} does not divide "
        f"config.model.heads={model.heads}",
    )
    require(
        config.sampling.guidance_channels <= config.latents.channels,
        f"config.sampling.guidance_channels={config.sampling.guidance_channels} "
        f"exceeds config.latents.channels={config.latents.channels}",
    )
    if config.eval.features == "digits":
        require(
            config.data.num_classes == 10 and config.data.resolution == 32,
            "config.eval.features='digits' needs config.data.num_classes=10 and "
            "config.data.resolution=32",
        )
    if config.eval.features == "inception":
        require(
            bool(config.eval.reference),
            "config.eval.features='inception' needs config.eval.reference, an .npz in "
            "ADM's format (docs/evaluation.md)",
        )
    for name, section in config.align.items():
        if section.enabled:
            _check_alignment(f"config.align.{name}", section, model.depth)


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


# A checkpoint trained with one value of these cannot go on, or go on as the same run,
# with another.
STATE_KEYS = ("latents", "model", "align", "transport", "data.num_classes", "optim")
STATE_FREE = ("model.scan", "model.remat", "model.attention", "model.dtype")


def differing(old: dict, new: dict) -> list[str]:
    """Lines "config.KEY: saved, now" for the keys that shape the trained state.

    Of an alignment that is off on both sides nothing counts.
    """
    old, new = (_without_disabled(dict(flatten(c))) for c in (old, new))
    return [
        f"config.{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if key.startswith(STATE_KEYS)
        and key not in STATE_FREE
        and old.get(key) != new.get(key)
    ]


def _without_disabled(flat: dict[str, Any]) -> dict[str, Any]:
    off = [k.removesuffix("enabled") for k, v in flat.items() if k.endswith(".enabled")]
    off = [section for section in off if not flat[f"{section}enabled"]]
    return {k: v for k, v in flat.items() if not k.startswith(tuple(off))}


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"
