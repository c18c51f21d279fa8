"""Networks on the Hugging Face hub: config.json, the weights in SiT's names, and the
VAE and the text encoder where they are folders of the run's owner."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.config import Config
from sra2_jax.errors import explained
from sra2_jax.generator import Generator, describe, open_run, read_settings
from sra2_jax.runtime import versions
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from sra2_jax.storage import read_json
from sra2_jax.weights.files import from_hub, read_file
from sra2_jax.weights.sit import from_reference

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PARTS = {"vae": "vae", "text.encoder": "text_encoder"}  # keys -> folders on the hub
HUB = "hub:"
ADVICE = "give owner/name[@revision] of one that `sra2 push` wrote"


def fetch_run(source: str) -> tuple[Path, Config]:
    """The folder of `owner/name[@revision]`, downloaded, and its config.

    An interrupted download goes on; with HF_HUB_OFFLINE=1 an earlier one is used.

    Raises UserError: the hub does not deliver it, or it is no network of this project.
    """
    parts = (f"{part}/*" for part in PARTS.values())
    folder = from_hub(source, ADVICE, [WEIGHTS, CONFIG, *parts])
    with explained(f"{source}: {CONFIG} is none of this project", ADVICE):
        config = Config.of(read_json(folder / CONFIG))
    values = config.flat()
    sent = {k: str(folder / part) for k, part in PARTS.items() if values[k] == part}
    return folder, config.override(sent)


def load_run(source: str, **sampling: Any) -> Generator:
    """The network of a run, to sample with: `generate(run.program, run.params, ...)`.

    source: a run's folder, whose newest EMA weights are taken, or
    hub:owner/name[@revision]; sampling: keys of config.sampling to change.

    Raises UserError: there is none, or no such key.
    """
    texts = {f"sampling.{name}": str(value) for name, value in sampling.items()}
    if not source.startswith(HUB):
        return open_run(source, read_settings(source, texts))
    folder, config = fetch_run(source.removeprefix(HUB))
    config = config.override(texts)
    program = Program(config, make_mesh())
    contents = read_file(folder / WEIGHTS)
    (weights,) = contents.sets.values()
    heads = program.abstract.params["heads"]
    network, found = from_reference(weights, program.network, heads, HEAD_NAMES)
    params = {"network": network, "heads": found}
    facts = {"run": source, "step": contents.step, "versions": versions()}
    settings = describe(config, **facts)
    return replace(Generator.of(program), params=params, settings=settings)
