"""Orbax checkpoints of the training state, verified, behind the calls a run needs."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from sra2_jax import config
from sra2_jax.errors import Restart, UserError, explained, one_line
from sra2_jax.fingerprint import fingerprints, kinds
from sra2_jax.run import ASIDE, Run, digest
from sra2_jax.runtime import AGAIN, agree
from sra2_jax.storage import is_remote

FORMAT = 1
# Errors that say nothing of what is on the disk: Python's, JAX's (a full device), and
# those that TensorStore puts in words.
ELSEWHERE = re.compile(
    "PermissionError|MemoryError|JaxRuntimeError|"
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED"
)
Unlogged = Sequence[dict[str, float]]
# An array of which each device holds a copy is saved in as many parts. To cut small
# ones takes longer than to write them whole.
PART_BYTES = 2**20
HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=PART_BYTES),
    )
)


class Damaged(Exception):
    """A checkpoint that cannot be read as it was written."""


@dataclass
class Best:
    """Orbax's policy that keeps the `count` checkpoints of the lowest finite scores."""

    count: int
    score: Callable[[int], float]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        scored = sorted((self.score(c.step), c.step) for c in checkpoints)
        best = [step for score, step in scored if np.isfinite(score)][: self.count]
        return [c.step in best for c in checkpoints]


class Checkpoints:
    """The checkpoints of a run; a context manager that ends with the last one saved.

    A checkpoint holds the state, a fingerprint of each of its arrays, and the metrics
    of the steps that no row of the log has yet.

    Args:
      keep: which ones are kept; None: nothing in the folder is made or removed.
      score: of a step; infinity where it has none.
      report: takes a line for a person.

    Raises UserError where there is no folder and none is to be made.
    """

    def __init__(
        self,
        run: Run,
        keep: config.Run | None = None,
        score: Callable[[int], float] = lambda step: float("inf"),
        report: Callable[[str], None] = print,
    ) -> None:
        remote = is_remote(run.checkpoints)
        self.folder = run.checkpoints if remote else run.checkpoints.absolute()
        self._run, self._report = run, report
        self._saved: int | None = None  # a step that was not looked at yet
        policy: Any = None
        if keep:
            newest = policies.LatestN(keep.keep_checkpoints)
            chosen: list[Any] = [newest, Best(keep.keep_best, score)]
            if keep.keep_every:
                chosen.append(policies.EveryNSteps(keep.keep_every))
            policy = policies.AnyPreservationPolicy(chosen)
        elif not self.folder.exists():
            raise UserError(f"{self.folder}: no such folder: give the workdir of a run")
        # Handlers are named so that metadata can be read before anything is restored.
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=keep is not None,
                read_only=keep is None,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=HANDLERS),
                "fingerprint": ocp.JsonCheckpointHandler(),
            },
        )
        # A bucket has no folders, but the run's config.
        self._sign = run.folder / "config.json" if remote else self.folder
        self._began = self._sign.exists()

    def _lost(self) -> bool:
        """Whether what was there at the start is no more."""
        return self._began and not self._sign.exists()

    def latest(self) -> int | None:
        """The newest step, whole or not."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, unlogged: Unlogged = ()) -> None:
        """Save in the background; a step saved already is left alone.

        Raises UserError: a value that is not finite, or a folder that is lost; Restart:
        an earlier save has failed.
        """
        if step == self.latest():
            return
        if self._lost():  # Orbax would make a new one
            raise UserError(f"{self.folder} is gone: step {step} is not saved")
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
        self.wait()
        with self._saving():
            self._manager.save(step, args=args)
            self._saved = step

    def check(self) -> None:
        """Raise, as `wait`, if a save in the background has failed. Does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background, and see that it left what can be read.
        Raises Restart: it has failed; UserError: since the folder is lost."""
        with self._saving():
            self._manager.wait_until_finished()
            step, self._saved = self._saved, None
            if step is not None and self._run.writes and not self._run.whole(step):
                raise OSError(f"step {step} is not there as it was saved")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            line = f"{self.folder}: a step could not be saved ({one_line(error)})"
            kind = UserError if self._lost() else Restart
            raise kind(f"{line}: mend it and {AGAIN}") from error

    def restore_newest(self, abstract: Any) -> tuple[int, Any, Unlogged] | None:
        """The newest checkpoint that is whole, placed as `abstract` says: its step, the
        state, and the metrics that were not logged yet. None: there is none.

        Damaged ones, newer than that, are set aside, with a line to `report`.

        Raises UserError: all are damaged, or the newest is of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, *self._verified(step, abstract, partial=False)
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
        if self._run.writes:
            while target.exists():
                target = self.folder / f"{target.name}-again"
            source.rename(target)
            if target.is_dir():
                (target / "reason.txt").write_text(reason + "\n")
        self._report(f"{source} is damaged ({reason}): set aside as {target.name}")
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of a step, the newest by default, placed as `abstract` says: all
        of it, or, of nested dicts, that part alone; nothing else is read then.

        Raises UserError: no such step, the checkpoint is of another model (the first
        array that differs is named), or it is damaged.
        """
        steps = sorted(self._manager.all_steps())
        there = f"{self.folder} has steps {', '.join(map(str, steps)) or 'none'}"
        step = steps[-1] if step is None and steps else step
        if step is None or step not in steps:
            raise UserError(f"no checkpoint of step {step or 'any'}: {there}")
        line = f"checkpoint {self.folder / str(step)} is damaged"
        with explained(line, f"take another: {there}", Damaged):
            return self._verified(step, abstract, isinstance(abstract, dict))[0]

    def _verified(
        self, step: int, abstract: Any, partial: bool
    ) -> tuple[Any, Unlogged]:
        """The state and what was not logged yet. Raises Damaged, on all processes
        alike, and UserError if it is of another model or cannot be read just now."""
        path, reason = self.folder / str(step), ""
        try:
            state, facts = self._read(path, abstract, partial)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = f"cannot be read: {one_line(error)}"
            if ELSEWHERE.search(reason):
                line = f"checkpoint {path} {reason}: mend it and run again"
                raise UserError(line) from error
        # What one process alone cannot read, the others know of before they compute.
        if reason := agree(reason):
            raise Damaged(reason)
        for name, value in fingerprints(state)[0].items():
            if facts["leaves"].get(name) != value:
                raise Damaged(f"{name} is not what was saved")
        return state, facts["unlogged"]

    def _read(
        self, path: epath.Path, abstract: Any, partial: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The state and what was saved beside it."""
        step = int(path.name)
        items = self._manager.item_metadata(step)
        if not {"state", "fingerprint"} & set(items):
            raise UserError(f"{path} is no checkpoint of a run: move it elsewhere")
        stored, wanted = kinds(items.state.tree), kinds(abstract)
        for name in sorted(wanted if partial else wanted.keys() | stored.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {path} is of another model: {name} "
                    f"is {stored.get(name, 'missing')} there, "
                    f"{wanted.get(name, 'missing')} in this config: use its config or "
                    "another --workdir"
                )
        args = ocp.args.Composite(fingerprint=ocp.args.JsonRestore())
        facts = dict(self._manager.restore(step, args=args).fingerprint)
        if facts.pop("sha256") != digest(facts):
            raise ValueError("its fingerprint is not what was saved")
        if facts["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {facts['format']}, this version reads "
                f"{FORMAT}: use the version that wrote it"
            )
        item = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        args = ocp.args.Composite(state=item)
        return self._manager.restore(step, args=args).state, facts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        with contextlib.suppress(Exception):  # says the same again
            self._manager.close()
