"""Orbax checkpoints of the training state, behind the few calls the loop needs."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sra2_jax.errors import UserError


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """ "a/b/c" -> (shape, dtype); the same names for a state and for its metadata."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return {
        "/".join(name(key) for key in path): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


class Checkpoints:
    """The checkpoints/ folder of a run.

    Args:
      folder: absolute path; made when missing.
      keep: newest checkpoints kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        # The handler is named so that metadata can be read before anything is restored.
        self._manager = ocp.CheckpointManager(
            folder,
            options=options,
            item_handlers={"state": ocp.PyTreeCheckpointHandler()},
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Save in the background; a step saved already is left alone."""
        if step != self.latest():
            item = ocp.args.PyTreeSave(state)
            self._manager.save(step, args=ocp.args.Composite(state=item))

    def restore(
        self, abstract: Any, step: int | None = None, partial: bool = False
    ) -> Any:
        """The state of a step, the newest by default, placed as `abstract` says.

        partial: `abstract` is a part of the state, as nested dicts; nothing else is
        read.

        Raises:
          UserError: no such step, the checkpoint is of another model (the first array
            that differs is named), or it cannot be read.
        """
        steps = self._manager.all_steps()
        if step is None and steps:
            step = max(steps)
        if step not in steps:
            found = f"it has {', '.join(map(str, steps))}" if steps else "it is empty"
            raise UserError(f"{self.folder}: no checkpoint of step {step}: {found}")
        where = f"checkpoint {self.folder / str(step)}"
        try:
            stored = _leaves(self._manager.item_metadata(step).state.tree)
        except Exception as error:
            raise UserError(self._unreadable(where, step, error)) from error
        wanted = _leaves(abstract)
        for name in sorted(wanted if partial else wanted.keys() | stored.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"{where} is of another model: {name} is "
                    f"{stored.get(name, 'missing')} there, "
                    f"{wanted.get(name, 'missing')} in this config: "
                    "use its config or another --workdir"
                )
        try:
            item = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=partial,
            )
            args = ocp.args.Composite(state=item)
            return self._manager.restore(step, args=args).state
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(self._unreadable(where, step, error)) from error

    def _unreadable(self, where: str, step: int | None, error: BaseException) -> str:
        while error.__cause__:
            error = error.__cause__  # what TensorStore said
        reason = (str(error).splitlines() or [""])[0][:200]
        others = [s for s in self._manager.all_steps() if s != step]
        way_out = (
            f"move it away to go on from step {max(others)}"
            if others
            else "it is the only one: use another --workdir to start afresh"
        )
        return f"{where} cannot be read ({type(error).__name__}: {reason}): {way_out}"

    def close(self) -> None:
        """Wait for saves in the background; raises what they raised."""
        self._manager.wait_until_finished()
        self._manager.close()
