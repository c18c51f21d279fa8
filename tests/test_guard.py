"""What is said of the numbers of a run; see also faults/test_mishaps."""

import math

import numpy as np
import pytest

from sra2_jax.log import Guard, mean


class Heard:
    """Stands for the log."""

    def __init__(self):
        self.events, self.messages = [], []

    def event(self, step, kind, **facts):
        self.events.append((step, kind, facts))

    def message(self, text):
        self.messages.append(text)


def metrics(loss, **more):
    fine = {"loss": loss, "loss_denoise": loss, "grad_norm": 1.0, "skipped": 0.0}
    return fine | more


def test_spikes_are_found_and_ordinary_losses_are_not():
    """7 standard deviations up is one, 4 are not, nor is a fall; none in the first
    steps; a skipped step is no spike."""
    heard = Heard()
    guard = Guard(3, heard)
    losses = 1 + 0.1 * np.random.default_rng(0).normal(size=3000).clip(-4, 4)
    losses[[20, 1000, 1500]] = 9.0, 1.7, 0.1
    for step, loss in enumerate(map(float, losses)):
        bad = metrics(math.inf, skipped=1.0)
        guard.check(step, bad if step == 2000 else metrics(loss), lambda: [7, 8])
    (spike, skipped) = heard.events
    assert spike[:2] == (1000, "spike")
    assert spike[2]["records"] == [7, 8]
    before = losses[800:1000]
    assert spike[2]["z"] == pytest.approx((1.7 - before.mean()) / before.std())
    assert skipped == (
        2000, "skipped", {"not_finite": ["loss", "loss_denoise"], "records": [7, 8]}
    )  # fmt: skip


def test_a_row_is_the_mean_of_the_steps_that_count():
    good = [metrics(1.0), metrics(3.0)]
    assert mean(good) == {"loss": 2.0, "loss_denoise": 2.0, "grad_norm": 1.0}
    bad = metrics(math.nan, skipped=1.0)
    assert mean([*good, bad]) == mean(good) | {"skipped": 1}
    assert mean([bad, bad]) == {"skipped": 2}
