"""A trained run, opened to be sampled: what sample.py and sweep.py share."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.command import add_distributed
from sra2_jax.errors import UserError
from sra2_jax.generate import Generate, describe, make_generate
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.restore import read_config, restore_weights
from sra2_jax.sharding import make_mesh, replicated
from sra2_jax.versions import versions
from sra2_jax.weights import load_vae

# keys of a run's config that sampling may change
FREE = ("sampling.", "seed", "vae", *configuration.STATE_FREE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a run and its weights."""
    parser.add_argument("workdir", metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint (the newest)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="(%(default)s)"
    )
    add_distributed(parser)
    parser.epilog = (
        "Sampling is as the run's config says; any key of its section sampling, and "
        "seed, vae and model.dtype, can be overridden: "
        "--config.sampling.guidance=1.8"
    )


def read_settings(workdir: str, overrides: Sequence[str]) -> ConfigDict:
    """A run's config with overrides of what sampling may change.

    Raises:
      UserError: no run, a key that is none or that sampling must not change.
    """
    saved = read_config(workdir)
    config = configuration.override(saved, overrides)
    before = dict(configuration.flatten(saved))
    for key, value in configuration.flatten(config):
        if value != before[key] and not key.startswith(FREE):
            raise UserError(
                f"config.{key} is part of the run: sampling can change "
                f"config.sampling.*, config.seed, config.vae"
            )
    configuration.check(config)
    return config


@dataclass(frozen=True)
class Subject:
    """A run's network and VAE on all devices.

    `settings` says what its samples are; `generate` is for the sampling section of
    `config`, `make` for another one.
    """

    config: ConfigDict
    settings: dict[str, Any]
    params: Any
    mesh: Mesh
    vae: AutoencoderKL
    vae_params: Any

    def make(self, config: ConfigDict) -> Generate:
        return make_generate(config, self.mesh, self.vae, self.vae_params)


def open_subject(
    config: ConfigDict, workdir: str, weights: str, step: int | None
) -> Subject:
    """Restore a run's weights and load its VAE.

    Raises:
      UserError: no such run or checkpoint, or no such VAE.
    """
    vae, vae_params = load_vae(config.vae)
    params, step = restore_weights(workdir, config, weights, step)
    mesh = make_mesh(-1, 1, batch_size=jax.device_count())
    settings = describe(
        config, run=workdir, step=step, weights=weights, versions=versions()
    )
    vae_params = jax.device_put(vae_params, replicated(mesh))
    return Subject(config, settings, params, mesh, vae, vae_params)
