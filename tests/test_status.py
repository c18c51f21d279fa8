"""How a run is doing, from its folder alone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Run as Keep
from sra2_jax.programs.status import describe, read_status
from sra2_jax.run import Run

ROOT = Path(__file__).parents[1]
CONFIG = {"name": "big", "steps": 1000, "batch_size": 32}


@pytest.fixture
def run(tmp_path):
    """A running run at step 500."""
    workdir = epath.Path(tmp_path) / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    rows = [
        {"step": s, "loss": 1 / s, "images_per_second": 64.0}
        for s in range(10, 501, 10)
    ]
    rows[3] |= {"skipped": 2}
    rows[4] = {"step": 50, "skipped": 10, "images_per_second": 64.0}
    rows.append({"step": 500, "eval/frechet": 0.2})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return workdir


def hold(run, **different):
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "started": "then"}
    lock |= {"beat": time.time()} | different
    (run / "lock.json").write_text(json.dumps(lock))


def test_a_running_run(run):
    hold(run)
    found = read_status(run)
    assert (found["step"], found["steps"], found["finished"]) == (500, 1000, False)
    assert found["loss"] == 1 / 500
    assert found["images_per_second"] == 64
    assert found["seconds_left"] == 500 * 32 / 64
    assert (found["skipped"], found["skipped_since"]) == (12, 10)
    assert found["running"]
    assert found["holder"]["pid"] == os.getpid()
    said = describe(found)
    assert "step 500 of 1,000 (50.0%)" in said
    assert "64.0 images/s, 0:04:10 left" in said
    assert "skipped: 12 updates since step 10" in said
    assert f"running: process {os.getpid()} on " in said


@pytest.mark.parametrize(
    "lock",
    [
        {"beat": time.time() - 100},  # silent
        {"beat": time.time() - 100, "host": "another"},
        {"pid": 2**22 + 1},  # beyond the largest there is
    ],
)
def test_a_lost_run(run, lock):
    hold(run, **lock)
    found = read_status(run)
    assert not found["running"]
    assert "lost, or hangs: process" in describe(found)
    hold(run, host="another", pid=2**22 + 1)
    assert read_status(run)["running"]


def test_checkpoints(run):
    """Two real ones; the newest is damaged, then set aside."""
    folder = run / "checkpoints"
    with Checkpoints(Run(run), Keep()) as checkpoints:
        for step in (400, 500):
            checkpoints.save(step, {"step": jnp.asarray(step), "a": jnp.ones(3)})
    (run / "results.json").write_text('{"step": 1000}')
    found = read_status(run)
    assert found["checkpoint"]["step"] == 500
    assert found["checkpoint"]["seconds_old"] < 60
    assert found["finished"]
    said = describe(found)
    assert "step 500 of 1,000 (50.0%), finished" in said
    assert "checkpoint: step 500, " in said
    assert " left" not in said

    facts = folder / "500" / "fingerprint" / "metadata"
    facts.write_text(facts.read_text().replace("1", "2", 1))
    assert read_status(run)["checkpoint"]["step"] == 400
    (folder / "500").rename(folder / "damaged-500")
    found = read_status(run)
    assert found["checkpoint"]["step"] == 400
    assert found["set_aside"] == ["damaged-500"]
    assert "damaged, set aside: 1 (damaged-500)" in describe(found)
    (folder / "400" / "state" / "_METADATA").unlink()
    assert read_status(run)["checkpoint"] is None


@pytest.mark.parametrize("size", [0, 1, 30, 59])
def test_half_written_files(run, size):
    """Cut anywhere, and of kinds that no run writes."""
    for name in ("config.json", "lock.json", "results.json"):
        (run / name).write_text(json.dumps(CONFIG)[:size])
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows + rows[:size] + "\n[]\n\0\n" + "[" * 10**5)
    (run / "checkpoints" / "7" / "fingerprint").mkdir(parents=True)
    (run / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "9").write_text("")
    found = read_status(run)
    assert found["step"] == 500
    assert found["checkpoint"] is None
    assert describe(found)
    (run / "metrics.jsonl").write_text(rows[: -size - 1])
    assert read_status(run)["step"] in (490, 500)
    (run / "metrics.jsonl").write_text("")
    assert "no step yet" in describe(read_status(run))


def test_program(run, tmp_path):
    """Several runs, some none; without what is slow to import."""
    hold(run)
    script = (
        "import sys; sys.modules['jax'] = sys.modules['tensorflow'] = None\n"
        "from sra2_jax.__main__ import console; console()"
    )

    def program(*arguments):
        command = [sys.executable, "-c", script, "status", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    began = time.perf_counter()
    done = program(run, run)
    assert time.perf_counter() - began < 3
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"{run}: step 500 of 1,000") == 2
    done = program("--json", run, tmp_path, tmp_path / "none")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert f"error: {tmp_path}: no run is there" in done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["step"] == 500
    for wrong in ((), (run, "--jsn")):
        done = program(*wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
