"""The folder of a run: claiming it, and what a resumed run may change."""

import json

import jax
from etils import epath
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.errors import UserError
from sra2_jax.versions import versions


def claim_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Make the folder and write config.json and versions.json.

    Raises:
      UserError: the folder holds the checkpoints of a run whose config differs in a
        key that shapes the trained state. Nothing is changed then.
    """
    saved = workdir / "config.json"
    checkpoints = workdir / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        try:
            old = json.loads(saved.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{workdir} holds checkpoints, but {saved} cannot be read "
                f"({type(error).__name__}): put the run's own config.json back or use "
                "another --workdir"
            ) from error
        if lines := configuration.differing(old, config.to_dict()):
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise UserError(
                f"{workdir} holds a run of another model: {'; '.join(lines[:3])}{more}"
                ": use another --workdir"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        saved.write_text(configuration.to_json(config))
        (workdir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
