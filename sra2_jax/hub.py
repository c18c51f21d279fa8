"""Networks on the Hugging Face hub: config.json, the weights in SiT's names, and the
VAE where it is one of the run's own."""

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

WEIGHTS, CONFIG, VAE = "model.safetensors", "config.json", "vae"
HUB = "hub:"
ADVICE = "give owner/name[@revision] of one that `sra2 push` wrote"


def fetch_run(source: str) -> tuple[Path, Config]:
    """The folder of `owner/name[@revision]`, downloaded, and its config.

    An interrupted download goes on; with HF_HUB_OFFLINE=1 an earlier one is used.

    Raises UserError: the hub does not deliver it, or it is no network of this project.
    """
    folder = from_hub(source, ADVICE, [WEIGHTS, CONFIG, f"{VAE}/*"])
    with explained(f"{source}: {CONFIG} is none of this project", ADVICE):
        config = Config.of(read_json(folder / CONFIG))
    if config.vae == VAE:
        config = config.override({"vae": str(folder / VAE)})
    return folder, config


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
