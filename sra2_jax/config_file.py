"""Configs from files, flags and saved runs."""

import os
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sra2_jax.config import DIGITS, WORDS, Config
from sra2_jax.errors import UserError, explained
from sra2_jax.section import fields, flatten, shown
from sra2_jax.storage import expand, is_remote

# size -> width, depth, heads of SiT
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
# size -> blocks of align.vae, align.encoder, align.teacher and of the teacher itself.
# XL and SRA 2 are published; for the others see docs/decisions.md.
BLOCKS = {
    "S": (2, 4, 3, 8),
    "B": (2, 4, 3, 8),
    "L": (8, 8, 6, 18),
    "XL": (8, 8, 8, 20),
}
# keys of align.vae that make it Internal Guidance (arXiv 2512.24176): a final layer on
# the aligned block predicts the velocity as well
INTERNAL_GUIDANCE = {
    "target": "velocity",
    "loss": "l2",
    "weight": 0.5,
    "head_layers": 1,
    "head_final_layer": True,
}
# A model of the Hugging Face hub; no ".." may lead out of the folder of downloads.
HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?"
)


def default() -> ConfigDict:
    """All keys at their defaults, for a config file to change."""
    return ConfigDict(Config().to_dict())


def set_size(config: ConfigDict, size: str) -> None:
    """Set the network to one of SiT's sizes, and the aligned blocks to its own."""
    config.model.width, config.model.depth, config.model.heads = SIZES[size]
    align = config.align
    align.vae.depth, align.encoder.depth, align.teacher.depth, teacher = BLOCKS[size]
    align.teacher.teacher_depth = teacher


def set_mmdit(config: ConfigDict) -> None:
    """REPA's text to image on MS-COCO (arXiv 2410.06940): network, data, sampling; the
    aligned block is the default one, 8."""
    config.steps = 150_000
    config.text.encoder = "openai/clip-vit-large-patch14"
    config.data.num_classes = 1
    model = config.model
    model.width, model.depth, model.heads = 768, 24, 24
    config.sampling.guidance = 2.0


def set_lightning(config: ConfigDict) -> None:
    """LightningDiT's block, latents and recipe (arXiv 2501.01423) for any size."""
    config.latents.size, config.latents.channels = 16, 32
    config.latents.scaling_factor = 1.0  # they are normalised by channel
    model, optim = config.model, config.optim
    model.patch_size, model.norm, model.mlp, model.rope = 1, "rms", "swiglu", True
    config.transport.time = "lognormal"
    config.batch_size, optim.learning_rate, optim.b2 = 1024, 2e-4, 0.95


def load(config: str | Path, *overrides: str) -> Config:
    """The config of a file, with overrides "section.key=value".

    config: a path, or the name of one of the project's: "sra2_b". Raises UserError: no
    such file, one that is no config, or as `Config.of`.
    """
    return override(config, dict(text.partition("=")[::2] for text in overrides))


def override(config: str | Path, texts: Mapping[str, str]) -> Config:
    """`load` with {"section.key": value as a text}.

    What the file says alone need not go together.
    """
    here = Path(__file__).resolve().parent  # configs/ is in it, or in a checkout beside
    named = [folder / "configs" / f"{config}.py" for folder in (here.parent, here)]
    path = next(filter(Path.is_file, (Path(config), *named)), None)
    if path is None:
        raise UserError(f"--config={config} names no file: see configs/")
    kinds = Exception, SystemExit  # a mistake in the file, of any kind
    with explained(f"--config={config} is no config file", kinds=kinds):
        file = runpy.run_path(str(path))["get_config"]()
        if not isinstance(file, ConfigDict):
            raise TypeError("its get_config() returns no ConfigDict")
    values = {**dict(flatten(file, Config)), **texts}
    paths = {name: expand(v) for name, v in values.items() if isinstance(v, str)}
    return Config().override(values | paths)


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Lines "config.KEY: old -> new" of what differs: in keys that a resumed run must
    not change, and in the others. Of an alignment that is off in both or goes on only
    that counts."""
    before, now = old.flat(), new.flat()
    off = tuple(
        f"align.{name}."
        for name in vars(new.align)
        if not before[f"align.{name}.enabled"] & now[f"align.{name}.enabled"]
    )
    fixed: list[str] = []
    others: list[str] = []
    for name, f in sorted(fields(Config).items()):
        counts = name.endswith(".enabled") or not name.startswith(off)
        if counts and before[name] != now[name]:
            line = f"config.{name}: {shown(before[name])} -> {shown(now[name])}"
            (others if f.metadata["key"].free else fixed).append(line)
    return fixed, others


def check_paths(config: Config, workdir: str) -> None:
    """Refuse a run in `workdir` that would not find what it reads, by the first key
    that names nothing (UserError). Remote names (gs://) are not looked at."""
    if set("[*?") & set(workdir if is_remote(workdir) else os.path.abspath(workdir)):
        raise UserError(
            f"--workdir={workdir}: its whole path must have no [, * or ?, which Orbax "
            "takes for patterns: it would lose all checkpoints"
        )
    hub = "no such folder, and no owner/name[@revision] of the Hugging Face hub"
    file = "no such file: docs/evaluation.md says how to get it"
    wanted = {"vae": (config.vae, hub)}  # key -> value, what is wrong with another
    data, e = config.data.dir or f"{workdir}/latents", config.eval
    if not exists(f"{data}/latents.json"):
        if not config.data.images:
            raise no_latents(data)
        how = "no such folder; it has a sub-folder for each class; or tfds:NAME, mnist"
        wanted["data.images"] = config.data.images, how
    if e.features in ("inception", "dinov2"):
        how = file if e.features == "inception" else hub
        wanted[f"eval.{e.features}"] = getattr(e, e.features), how
        wanted["eval.reference"] = e.reference, file
    if config.text.encoder:
        wanted["text.encoder"] = config.text.encoder, hub
    for name, section in vars(config.align).items():
        if section.enabled and getattr(section, "source", "") == "images":
            wanted[f"align.{name}.model"] = section.model, hub
    for name, (value, how) in wanted.items():
        if not exists(value) and not (how == hub and HUB_ID.fullmatch(value)):
            raise UserError(f"config.{name}={value}: {how}")


def no_latents(folder: Any) -> UserError:
    """The error for a run with neither a dataset nor images to make one."""
    return UserError(
        f"no latents dataset in {folder}: set --config.data.dir=FOLDER, or "
        "--config.data.images=SOURCE to encode it first"
    )


def exists(source: str) -> bool:
    """Whether a local file or folder is there; what is not local is not looked at."""
    apart = (
        source in (*DIGITS, WORDS) or source.startswith("tfds:") or is_remote(source)
    )
    return apart or (bool(source) and Path(source).exists())
