"""A run's folder, opened by other programs: its config and its trained state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.errors import UserError
from sra2_jax.optim import make_optimizer
from sra2_jax.sharding import make_mesh
from sra2_jax.state import TrainState, create_sharded


def read_config(workdir: str) -> ConfigDict:
    """The config that the run in `workdir` was started with.

    Raises:
      UserError: no config.json there, or one that this version cannot use.
    """
    path = epath.Path(workdir) / "config.json"
    return configuration.from_saved(configuration.read_json(path), str(path))


def restore_run(workdir: str, step: int | None = None) -> tuple[ConfigDict, TrainState]:
    """The config and a checkpoint of a run, the newest by default, on all devices.

    `state.ema["network"]` and `state.params["network"]` are trees of the run's DiT,
    see `training.state.build_networks`; `state.step` says which step it is.

    Raises:
      UserError: no run, no such checkpoint, or one that cannot be read.
    """
    config = read_config(workdir)
    with _open(workdir, config) as (checkpoints, abstract):
        return config, checkpoints.restore(abstract, step)


def restore_weights(
    workdir: str, config: ConfigDict, weights: str, step: int | None = None
) -> tuple[Any, int]:
    """The DiT's tree alone and the step it is of, copied to every device.

    Optimizer moments and the other set of weights are not read: a quarter of the file.

    weights: "ema" or "raw". config: the run's; it may differ in what makes no other
    tree. Raises as `restore_run`.
    """
    with _open(workdir, config) as (checkpoints, abstract):
        key = {"ema": "ema", "raw": "params"}[weights]
        wanted: dict[str, Any] = {key: {"network": getattr(abstract, key)["network"]}}
        wanted["step"] = abstract.step
        state = checkpoints.restore(wanted, step, partial=True)
    return state[key]["network"], int(state["step"])


@contextmanager
def _open(workdir: str, config: ConfigDict) -> Iterator[tuple[Checkpoints, TrainState]]:
    """A run's checkpoints and the abstract state, replicated."""
    folder = epath.Path(workdir).absolute() / "checkpoints"
    if not folder.exists():
        raise UserError(f"{folder}: no such folder: give the workdir of a run")
    mesh = make_mesh(-1, 1, batch_size=jax.device_count())
    transform, _ = make_optimizer(**config.optim)
    abstract, _ = create_sharded(config, transform, mesh)
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        yield checkpoints, abstract
    finally:
        checkpoints.close()
