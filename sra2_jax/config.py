"""Reading configurations: from files, flags and runs; what a resumed run may change."""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sra2_jax.config_checks import HUB_ID, KEYS, allowed, fits, kind, shown, unknown_key
from sra2_jax.config_checks import check as check
from sra2_jax.config_checks import flatten as flatten
from sra2_jax.errors import UserError
from sra2_jax.flags import pairs, parse_known

MEGABYTE = 2**20


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, with overrides "--config.KEY=VALUE" applied; not checked.

    Raises:
      UserError: no such file, one that is no config, an unknown key, a value that the
        key may not have.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config={path} names no file: see configs/")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: must end in .py, as those in configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # a mistake in the file, of any kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--config={path} is no config file ({reason})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: its get_config() returns no ConfigDict")
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of a config with "--config.KEY=VALUE" applied; not checked.

    Raises:
      UserError: an unknown key, one given twice, a value that the key may not have.
    """
    config = config.copy_and_resolve_references()
    values: dict[str, Any] = {}
    for flag, text in pairs(overrides):
        section, _, key = flag.partition(".")
        if section != "config":
            hint = "--help lists the flags"
            if flag in KEYS:
                hint = f"did you mean --config.{flag}?"
            raise UserError(f"unknown flag --{flag}: {hint}")
        if key not in KEYS:
            raise unknown_key(key)
        if text is None:
            raise UserError(f"--config.{key} has no value: {allowed(key)}")
        if key in values:
            raise UserError(f"--config.{key} is given twice: leave one out")
        values[key] = parse(key, text)
    try:
        config.update_from_flattened_dict(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config file does not fit ({error}): begin with configs/default.py"
        ) from error
    return config.lock()


def parse(key: str, text: str) -> Any:
    """The value of a key, written as a text.

    Raises:
      UserError: the key may not have it.
    """
    wanted, value = kind(key), None
    if wanted is bool:
        value = {"true": True, "false": False}.get(text.lower())
    elif wanted is not int or re.fullmatch(r"[+-]?[0-9][0-9_]{,99}", text):
        try:
            value = wanted(text)
        except ValueError:
            value = None
    if value is None or not fits(key, value):
        given = shown(text if value is None else value)
        raise UserError(f"config.{key}={given}: {allowed(key)}")
    return value


def parse_arguments(
    parser: argparse.ArgumentParser, default: str
) -> tuple[argparse.Namespace, ConfigDict]:
    """A program's own flags, and the checked config of --config and --config.KEY=VALUE.

    Args:
      parser: made with allow_abbrev=False; gets the flags --config and --keys.
      default: the config file where none is named.

    Raises:
      UserError: as `load` and `check`.
    """
    parser.add_argument("--config", default=default, help="file (%(default)s)")
    parser.add_argument(
        "--keys", action="store_true", help="list the config's keys and end"
    )
    parser.epilog = (
        "Any key of the config: --config.KEY=VALUE. --keys lists them; "
        "configs/default.py says what they mean."
    )
    arguments, rest = parse_known(parser)
    config = load(arguments.config, rest)
    check(config)
    if arguments.keys:
        for key, value in flatten(config):
            print(f"--config.{key}={value}  ({allowed(key)})")
        sys.exit()
    return arguments, config


def read_json(path: Any, limit: int = MEGABYTE) -> Any:
    """What a JSON file of at most `limit` bytes holds, a path of pathlib's or epath's.

    Raises:
      UserError: it cannot be read, is too large, or is not JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__
        if not isinstance(error, OSError):
            reason = f"not JSON of a run, {' '.join(str(error).split())[:100]}"
        raise UserError(f"{path} cannot be read ({reason})") from error


def check_paths(config: ConfigDict, workdir: str) -> None:
    """Refuse a run in `workdir` that would not find what it reads. Only looks at
    names, and not at remote ones (gs://).

    Raises:
      UserError: the first key that names nothing.
    """
    data = config.data.dir or f"{workdir}/latents"
    images, scores = config.data.images, config.eval
    if not _exists(f"{data}/latents.json"):
        if not images:
            raise no_latents(data)
        if not _exists(images):
            raise UserError(
                f"config.data.images={images}: no such folder: give one with a "
                "sub-folder for each class, tfds:NAME[:SPLIT] or digits"
            )
    if scores.features == "inception":
        for key in ("inception", "reference"):
            if not _exists(scores[key]):
                raise UserError(
                    f"config.eval.{key}={scores[key]}: no such file: docs/evaluation.md"
                    " says how to get it"
                )
    encoder = config.align.encoder
    networks = {"vae": config.vae}
    if encoder.enabled and encoder.source == "images":
        networks["align.encoder.model"] = encoder.model
    for key, source in networks.items():
        if not (_exists(source) or HUB_ID.fullmatch(source)):
            raise UserError(
                f"config.{key}={source}: no such folder, and no owner/name[@revision] "
                "of the Hugging Face hub either"
            )


def no_latents(folder: Any) -> UserError:
    """The error for a run with neither a dataset nor images to make one."""
    return UserError(
        f"no latents dataset in {folder}: set --config.data.dir=FOLDER, or "
        "--config.data.images=SOURCE to encode it first"
    )


def _exists(source: str) -> bool:
    """Whether a local file or folder is there; what is not local is not looked at."""
    apart = source == "digits" or source.startswith("tfds:") or "://" in source
    return apart or (bool(source) and Path(source).expanduser().exists())


def from_saved(saved: Any, where: str) -> ConfigDict:
    """The config of a run's config.json.

    Raises:
      UserError: it is not one that this version wrote.
    """
    try:
        if not isinstance(saved, dict):
            raise UserError("no JSON object")
        config = ConfigDict(saved).lock()
        check(config)
    except (UserError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {error}: written by another version, or not by this program"
        ) from error
    return config


# A checkpoint trained with one value of these cannot go on as the same run with
# another: the network, what it learns, its data's order, its random draws.
STATE_KEYS = (
    "seed",
    "batch_size",
    "data.resolution",
    "data.num_classes",
    "data.streams",
    "data.shuffle_buffer",
    "latents.",
    "model.",
    "label_dropout",
    "transport.",
    "align.",
    "optim.",
    "ema_decay",
)
STATE_FREE = ("model.scan", "model.remat", "model.attention", "model.dtype")


def differing(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """Lines "config.KEY: saved -> now" of what differs: in keys that a resumed run must
    not change, and in the others.

    Of an alignment that is off on a side only that counts.
    """
    old, new = dict(flatten(old)), dict(flatten(new))
    fixed: list[str] = []
    free: list[str] = []
    off = {
        k.removesuffix("enabled")
        for c in (old, new)
        for k, on in c.items()
        if _says_off(k, on)
    }
    for key in sorted(old.keys() | new.keys()):
        counts = key.endswith(".enabled") or not key.startswith(tuple(off))
        if counts and old.get(key) != new.get(key):
            line = f"config.{key}: {shown(old.get(key))} -> {shown(new.get(key))}"
            bound = key.startswith(STATE_KEYS) and key not in STATE_FREE
            (fixed if bound else free).append(line)
    return fixed, free


def _says_off(key: str, value: Any) -> bool:
    return key.endswith(".enabled") and value is False


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"
