"""Runs that are stopped, anywhere and anyhow, and go on as if nothing had been."""

import json
import signal

import jax
import numpy as np
import pytest

from tests.test_train import final_state, rows, without_speed


def saved(workdir):
    """Steps with a whole checkpoint."""
    names = [p.name for p in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


@pytest.mark.timeout(600)  # of a busy machine
def test_a_run_stopped_everywhere_is_the_run_never_stopped(
    start, command, whole, tiny, tmp_path
):
    """SIGTERM at the start, while a checkpoint is written, while data is waited for and
    while sampling: status 42 and the last finished step is saved. SIGKILL while a
    checkpoint is written: the one before counts, and the lock is taken over, which a
    second run is refused by. In the end all rows, the picture and the state are those
    of a run that nothing stopped, bit for bit."""
    other = tmp_path / "other"
    run, blind = [*command, f"--workdir={other}"], {"no_pictures": 1}
    early = start(*run, **blind).until(lambda: (other / "lock.json").exists())
    assert early.kill().status(60) == 42

    saving = start(*run, **blind, slow_commit=1.5, slow_steps=0.2).until("saving")
    assert saving.kill().status(60) == 42
    assert (step := saved(other)[-1]) in (4, 5, 6, 7, 8)

    waiting = start(*run, **blind, no_data=1).until("no data")
    second, held = start(*run), json.loads((other / "lock.json").read_text())
    assert second.status(10) == 2
    assert held["pid"] == waiting.pid
    holder = f"is in use by process {held['pid']} on {held['host']}, started 20"
    assert holder in second.text
    assert waiting.kill().status(60) == 42
    assert f"step {step + 1} is saved" in waiting.text
    assert saved(other)[-1] == step + 1

    sampling = start(*run, slow_samples=1, no_report=1).until("sampling")
    assert sampling.kill().status(60) == 42
    assert (step := saved(other)[-1]) in (10, 12)

    killed = start(*run, "--config.steps=13", **blind, slow_commit=2).until("saving")
    assert killed.kill(signal.SIGKILL).status() == -9
    assert saved(other)[-1] == step

    assert start(*run, no_report=1).status() == 0
    assert without_speed(rows(other)) == without_speed(rows(whole))
    assert [r["step"] for r in rows(whole)] == [2, 4, 6, 8, 10, 12]
    for name in ("samples/step_00000010.png", "samples/step_00000012.png"):
        assert (other / name).read_bytes() == (whole / name).read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal,
        final_state(tiny, whole),
        final_state(tiny, other),
    )
