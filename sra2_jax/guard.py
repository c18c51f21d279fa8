"""Looks at the numbers of every step: updates that were skipped, losses that jump."""

import math
from collections import deque
from collections.abc import Callable

from sra2_jax.errors import UserError
from sra2_jax.log import Log

WINDOW, ENOUGH = 200, 50  # losses that a new one is held against, at least so many
SPIKE = 6.0  # standard deviations


class Guard:
    """Writes what it finds to the log's events, with the ids of the batch's records.

    Args:
      most_skipped: skipped updates in a row that are borne.
    """

    def __init__(self, most_skipped: int, log: Log) -> None:
        self._most, self._log = most_skipped, log
        self._skipped: list[int] = []  # steps, in a row
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(
        self, step: int, metrics: dict[str, float], records: Callable[[], list[int]]
    ) -> None:
        """Take a step's metrics, the same on all processes, which call it together.

        records: gives the `index` of each record of the batch.

        Raises:
          UserError: more updates skipped in a row than are borne.
        """
        if metrics["skipped"]:
            self._skipped.append(step)
            bad = sorted(k for k, v in metrics.items() if not math.isfinite(v))
            found = records()
            self._log.event(step, "skipped", not_finite=bad, records=found)
            self._log.message(
                f"step {step}: {', '.join(bad)} not finite: the update was skipped"
            )
            if len(self._skipped) > self._most:
                raise UserError(self._diagnosis(bad, found))
            return
        self._skipped = []
        loss = metrics["loss"]
        if len(self._losses) >= ENOUGH and (z := self._z(loss)) > SPIKE:
            self._log.event(step, "spike", loss=loss, z=z, records=records())
            self._log.message(
                f"step {step}: loss {loss:.4g} is {z:.1f} standard deviations above "
                f"that of the last {len(self._losses)} steps"
            )
        self._losses.append(loss)

    def _z(self, loss: float) -> float:
        mean = sum(self._losses) / len(self._losses)
        variance = sum((x - mean) ** 2 for x in self._losses) / len(self._losses)
        # The floor is for losses that are all alike.
        return (loss - mean) / max(math.sqrt(variance), 1e-6 * abs(mean), 1e-30)

    def _diagnosis(self, bad: list[str], records: list[int]) -> str:
        first, last = self._skipped[0], self._skipped[-1]
        terms = [k for k in bad if k not in ("loss", "grad_norm")]
        if terms:
            cause = f"{', '.join(terms)} not finite: look at that term and the records"
        elif "loss" in bad:
            cause = "the sum of the losses overflows: lower config.align.*.weight"
        else:
            cause = "finite losses with gradients that are not: lower the learning rate"
        return (
            f"the updates of steps {first} to {last} were all skipped, more than "
            f"config.run.most_skipped={self._most} ({cause}; the last batch held "
            f"records {', '.join(map(str, records[:8]))}, ..., events.jsonl lists all)"
        )
