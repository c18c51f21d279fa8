"""The folder of a run: claiming it, and what a resumed run may change."""

import hashlib
import json
import sys
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax.data import records
from sra2_jax.errors import UserError
from sra2_jax.versions import versions

TRIES = (0.5, 1, 2)  # seconds between them


def claim_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Make the folder and write config.json and versions.json.

    Of a run that goes on it prints each key of the config that has changed.

    Raises:
      UserError: its run has another value of a key that a resumed run must not change,
        or its config.json cannot be read. Nothing is changed then.
    """
    saved = workdir / "config.json"
    if holds_checkpoints(workdir):
        try:
            old = configuration.read_json(saved)
            if not isinstance(old, dict):
                raise UserError(f"{saved} cannot be read (no JSON object)")
        except UserError as error:
            raise UserError(
                f"{workdir} holds checkpoints, but {error}: put the run's own "
                "config.json back or use another --workdir"
            ) from error
        fixed, free = configuration.differing(old, config.to_dict())
        if fixed:
            more = f" (and {len(fixed) - 3} more)" if len(fixed) > 3 else ""
            raise UserError(
                f"{workdir} holds a run of another config: {'; '.join(fixed[:3])}{more}"
                ": set them back or use another --workdir"
            )
        if jax.process_index() == 0:
            for line in free:
                print(f"resumed with {line}", file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(saved, configuration.to_json(config))
        write_whole(workdir / "versions.json", json.dumps(versions(), indent=2) + "\n")


def check_dataset(workdir: epath.Path, folder: epath.Path) -> str:
    """SHA-256 of a dataset's latents.json, which a run keeps in its run.json, as
    latents.sha256. The dataset may move, but not become another one.

    Raises:
      UserError: the run in `workdir` has checkpoints and was trained on another one.
    """
    digest = hashlib.sha256((folder / records.FILE).read_bytes()).hexdigest()
    facts = workdir / "run.json"
    if holds_checkpoints(workdir) and facts.exists():
        found = configuration.read_json(facts)
        latents = found.get("latents") if isinstance(found, dict) else None
        before = latents.get("sha256", digest) if isinstance(latents, dict) else digest
        if before != digest:
            raise UserError(
                f"{folder} is not the dataset that {workdir} was trained on (SHA-256 "
                f"of {records.FILE}: {str(before)[:12]} -> {digest[:12]}): give that "
                "one or use another --workdir"
            )
    return digest


def holds_checkpoints(workdir: epath.Path) -> bool:
    """Whether any step was saved."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def write_whole(path: epath.Path, text: str) -> None:
    """Write a small file, all of it or nothing; a passing error is tried again.

    Raises:
      OSError: still not possible after three and a half seconds.
    """
    temporary = path.parent / f"{path.name}.tmp"
    for pause in (*TRIES, None):
        try:
            temporary.write_text(text)
            temporary.replace(path)
            return
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
