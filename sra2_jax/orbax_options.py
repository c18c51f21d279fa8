"""What Orbax's manager is given: which checkpoints it keeps, where processes meet."""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies


class Barrier:
    """Orbax's barrier between processes; `error` is that of a save that failed.

    The process on which a save fails comes to a barrier other than that at which all
    the others are, with the error on its hands: they would wait for one another until
    Orbax's timeout of 20 minutes. It does not wait here, but can tell the others.
    """

    error: BaseException | None = None

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if jax.process_count() > 1:
            # The main thread may well save while it handles a Stop.
            if threading.current_thread() is not threading.main_thread():
                self.error = self.error or sys.exception()
            if self.error:
                raise self.error
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Best:
    """Orbax's policy that keeps the `count` checkpoints of the lowest finite scores."""

    def __init__(self, count: int, score: Callable[[int], float]) -> None:
        self._count, self._score = count, score

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        scored = sorted((self._score(c.step), c.step) for c in checkpoints)
        best = [step for score, step in scored if np.isfinite(score)][: self._count]
        return [c.step in best for c in checkpoints]


def kept(newest: int, every: int, best: Best) -> policies.AnyPreservationPolicy:
    """The policy that keeps what any of these does; every: steps, 0 for none."""
    chosen: list[Any] = [policies.LatestN(newest), best]
    if every:
        chosen.append(policies.EveryNSteps(every))
    return policies.AnyPreservationPolicy(chosen)
