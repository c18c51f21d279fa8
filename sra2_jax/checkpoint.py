"""Orbax checkpoints of the training state, verified, behind the calls a run needs."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from errno import EACCES, ENOENT, ENOTDIR, EPERM, EROFS, ESTALE
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sra2_jax.damage import Damaged, agreed, said, unreadable
from sra2_jax.errors import Restart, UserError
from sra2_jax.fingerprint import fingerprints, kinds
from sra2_jax.marks import ASIDE, digest
from sra2_jax.orbax_options import Barrier, Best, kept

FORMAT = 1
TEMPORARY = "*.orbax-checkpoint-tmp*"
LOST = {EACCES, ENOENT, ENOTDIR, EPERM, EROFS, ESTALE}
Unlogged = Sequence[dict[str, float]]


def tell(line: str) -> None:
    """A line for a person."""
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints/ folder of a run.

    A checkpoint holds the state, a fingerprint of each of its arrays, and the metrics
    of the steps that no row of the log has yet.

    Args:
      folder: absolute path; made when missing.
      keep: newest checkpoints kept.
      keep_every: steps of which checkpoints are kept besides; 0: none.
      keep_best: checkpoints with the lowest score kept besides.
      score: of a step; infinity where it has none.
      report: takes a line for a person.
      read_only: nothing in the folder is made, removed or renamed.

    Raises:
      UserError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: epath.Path,
        keep: int = 1,
        *,
        keep_every: int = 0,
        keep_best: int = 0,
        score: Callable[[int], float] = lambda step: float("inf"),
        report: Callable[[str], None] = tell,
        read_only: bool = False,
    ) -> None:
        self.folder = epath.Path(folder)
        self.report, self.score = report, score
        best = Best(keep_best, lambda step: self.score(step))
        self._barrier = Barrier()
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=kept(keep, keep_every, best),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
        )
        self._saving: int | None = None
        self._manager = self._open()
        if not read_only and not self._writable():
            raise UserError(f"{self.folder} is no folder that can be written: mend it")

    def _open(self) -> ocp.CheckpointManager:
        # Handlers are named so that metadata can be read before anything is restored.
        return ocp.CheckpointManager(
            self.folder,
            options=self._options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "fingerprint": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, unlogged: Unlogged = ()) -> bool:
        """Save in the background; a step saved already is left alone.

        Returns whether the save has begun, and no earlier one has failed.

        Raises:
          UserError: a value that is not finite, or a folder that is lost.
        """
        if step == self.latest():
            return True
        if not self._writable():  # Orbax would make a new one
            raise UserError(
                f"{self.folder} is gone or cannot be written: step {step} is not saved"
            )
        values, bad = fingerprints(state)
        if bad:
            raise UserError(
                f"step {step} is not saved: {bad[0]} is not finite; what was saved "
                "before is whole"
            )
        facts = {"format": FORMAT, "leaves": values, "unlogged": list(unlogged)}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            fingerprint=ocp.args.JsonSave(facts | {"sha256": digest(facts)}),
        )
        try:
            self._finish()  # an earlier one
            self._manager.save(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._failed(step if self._saving is None else self._saving, error)
            return False
        self._saving = step
        return True

    def failed(self) -> bool:
        """Whether a save in the background has ended, and failed: then it was reported
        and removed, and another `save` may try again. Does not wait.

        Raises:
          UserError: the folder is lost.
        """
        working = self._manager.is_saving_in_progress() and not self._barrier.error
        return self._saving is not None and not working and not self.wait()

    def wait(self) -> bool:
        """Wait for the save in the background; whether it went well."""
        try:
            self._finish()
        except Exception as error:
            self._failed(self._saving, error)
            return False
        return True

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._saving = None

    def _failed(self, step: int | None, error: BaseException) -> None:
        """Report, remove what was half written, and be ready again."""
        self._saving = None
        line = f"{self.folder}: step {step} could not be saved ({said(error)})"
        again = "run the same command again to go on from the last checkpoint"
        if not self._writable():
            raise UserError(f"{line}: mend it and {again}") from error
        if jax.process_count() > 1:  # the others wait for this one, in Orbax
            raise Restart(f"{line}: {again}") from error
        self.report(f"{line}: training goes on and tries again")
        with contextlib.suppress(Exception):  # says the same again
            self._manager.close()
        for left in self.folder.glob(TEMPORARY):
            left.rmtree(missing_ok=True)
        self._manager = self._open()

    def _writable(self) -> bool:
        """Whether the folder is there and takes changes, if perhaps not just now."""
        probe = self.folder / f".probe-{jax.process_index()}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            return error.errno not in LOST  # full, say
        return True

    def restore_newest(self, abstract: Any) -> tuple[int, Any, Unlogged] | None:
        """The newest checkpoint that is whole, placed as `abstract` says: its step, the
        state, and the metrics that were not logged yet. None: there is none.

        Damaged ones, newer than that, are set aside, with a line to `report`.

        Raises:
          UserError: all are damaged, or the newest is of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, *self._verified(step, abstract)
            except Damaged as error:
                self._set_aside(step, str(error))
        if steps:
            raise UserError(
                f"{self.folder}: all checkpoints are damaged and set aside: copy a "
                "whole one there, or use another --workdir to start afresh"
            )
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        source = self.folder / str(step)
        target = self.folder / f"{ASIDE}{step}"
        if jax.process_index() == 0:
            number = 1
            while target.exists():
                number += 1
                target = self.folder / f"{ASIDE}{step}-{number}"
            source.rename(target)
            if target.is_dir():
                (target / "reason.txt").write_text(reason + "\n")
        self.report(f"{source} is damaged ({reason}): set aside as {target.name}")
        agreed("")  # after the renaming
        self._manager.reload()

    def restore(
        self, abstract: Any, step: int | None = None, partial: bool = False
    ) -> Any:
        """The state of a step, the newest by default, placed as `abstract` says.

        partial: `abstract` is a part of the state, as nested dicts; nothing else is
        read.

        Raises:
          UserError: no such step, the checkpoint is of another model (the first array
            that differs is named), or it is damaged.
        """
        steps = self._manager.all_steps()
        if step is None and steps:
            step = max(steps)
        if step is None or step not in steps:
            asked = "" if step is None else f" of step {step}"
            found = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"{self.folder}: no checkpoint{asked}: {found}")
        try:
            return self._verified(step, abstract, partial)[0]
        except Damaged as error:
            others = [s for s in steps if s != step]
            way_out = f"take step {max(others)}" if others else "it is the only one"
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged ({error}): {way_out}"
            ) from error

    def _verified(
        self, step: int, abstract: Any, partial: bool = False
    ) -> tuple[Any, Unlogged]:
        """The state and what was not logged yet. Raises Damaged, on all processes
        alike, and UserError if it is of another model or cannot be read just now."""
        reason = ""
        try:
            state, facts = self._read(step, abstract, partial)
        except Damaged as error:
            reason = str(error)
        # What one process alone cannot read, the others know of before they compute.
        if reason := agreed(reason):
            raise Damaged(reason)
        for name, value in fingerprints(state)[0].items():
            if facts["leaves"].get(name) != value:
                raise Damaged(f"{name} is not what was saved")
        return state, facts["unlogged"]

    def _read(
        self, step: int, abstract: Any, partial: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The state and what was saved beside it."""
        path = self.folder / str(step)
        try:
            items = self._manager.item_metadata(step)
            if not {"state", "fingerprint"} & set(items):
                raise UserError(f"{path} is no checkpoint of a run: move it elsewhere")
            stored = kinds(items.state.tree)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise unreadable(path, "its metadata", error) from error
        wanted = kinds(abstract)
        for name in sorted(wanted if partial else wanted.keys() | stored.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {path} is of another model: {name} "
                    f"is {stored.get(name, 'missing')} there, "
                    f"{wanted.get(name, 'missing')} in this config: use its config or "
                    "another --workdir"
                )
        facts = self._facts(step)
        try:
            item = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=partial,
            )
            args = ocp.args.Composite(state=item)
            state = self._manager.restore(step, args=args).state
        except Exception as error:
            raise unreadable(path, "it", error) from error
        return state, facts

    def _facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the state. Raises Damaged."""
        try:
            args = ocp.args.Composite(fingerprint=ocp.args.JsonRestore())
            facts = dict(self._manager.restore(step, args=args).fingerprint)
            whole = facts.pop("sha256") == digest(facts)
        except Exception as error:
            path = self.folder / str(step)
            raise unreadable(path, "its fingerprint", error) from error
        if not whole:
            raise Damaged("its fingerprint is not what was saved")
        if facts["format"] != FORMAT:
            raise UserError(
                f"checkpoint {self.folder / str(step)} has format {facts['format']}, "
                f"this version reads {FORMAT}: use the version that wrote it"
            )
        return facts

    def close(self) -> None:
        """Wait for the save in the background.

        Raises:
          UserError: it has failed.
        """
        if self._barrier.error:  # told already; Orbax would wait for the others
            return
        step = self._saving
        try:
            self._finish()
        except Exception as error:
            raise UserError(
                f"{self.folder}: step {step} could not be saved ({said(error)}): "
                "mend it and run the same command again to go on from the last "
                "checkpoint"
            ) from error
        self._manager.close()
