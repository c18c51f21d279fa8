"""What goes wrong around a run: who is told what, and what is kept."""

import json
import signal
import time

import pytest


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_run_in_a_workdir_a_stall_and_a_lost_folder(start, command, tmp_path):
    """A second run is refused within 5 s; no progress ends the first with the stacks of
    all threads, and the status that says: again; a folder that vanishes ends its run.
    A dead run's lock is taken over in test_stopped."""
    workdir = tmp_path / "run"
    run = [*command, f"--workdir={workdir}"]
    faults = {"no_data": 2, "no_pictures": 1}
    first = start(*run, "--config.run.stall_seconds=20", **faults).until("no data")
    began = time.monotonic()
    second = start(*run)
    assert second.status() == 2
    assert time.monotonic() - began < 10  # 5 on a machine with nothing else to do
    held = json.loads((workdir / "lock.json").read_text())
    assert held["pid"] == first.pid
    assert f"is in use by process {first.pid} on {held['host']}, started 20" in (
        second.text
    )
    assert first.status() == 42
    assert "stopped: no progress for 20 s (data), see the stacks" in first.text
    assert "in no_data" in first.text or 'driver.py", line' in first.text
    third = start(*run, **faults, fast_beat=0.2).until("no data")
    assert json.loads((workdir / "lock.json").read_text())["pid"] == third.pid
    workdir.rename(tmp_path / "moved")
    assert third.status() == 2
    assert f"error: {workdir} is lost" in third.text


def test_infinite_latents(start, command, tmp_path):
    """One batch: its update is skipped, its records are named, training goes on. More
    than are borne: the run ends and says why; what it saved is whole."""
    workdir = tmp_path / "run"
    faults = {"no_tensorboard": 1, "no_pictures": 1}
    many = "--config.run.most_skipped=3", f"--workdir={workdir}"
    run = start(*command, *many, infinite=[2, 5, 6, 7, 8], **faults)
    assert run.status() == 2
    rows = lines(workdir / "metrics.jsonl")
    assert [r.get("skipped", 0) for r in rows] == [0, 1, 1, 2]
    assert ["loss" in r for r in rows] == [True, True, True, False]
    event, *more = lines(workdir / "events.jsonl")
    assert [e["step"] for e in (event, *more) if e["event"] == "skipped"][:4] == [
        3, 6, 7, 8
    ]  # fmt: skip
    assert "loss_denoise" in event["not_finite"]
    assert len(set(event["records"])) == 16
    assert "step 3: grad_norm, loss, loss_align_vae, loss_denoise" in run.text
    assert run.text.count("TensorBoard cannot be written (OSError: [Errno 28]") == 1
    assert "error: the updates of steps 6 to 9 were all skipped, more than " in run.text
    names = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert "8" in names  # the state is that of step 5


@pytest.fixture
def job(command, tmp_path):
    return [*command, "--heartbeat_seconds=6", f"--workdir={tmp_path / 'pair'}"]


def test_sigterm_to_one_of_two_stops_both(pair, job, tmp_path):
    """At the same step, which is saved."""
    first, second = pair(*job, slow_steps=0.1, no_pictures=1)
    rows = tmp_path / "pair" / "metrics.jsonl"
    second.until(lambda: rows.exists() and len(lines(rows)) == 2)
    second.kill()
    assert [first.status(), second.status()] == [42, 42]
    (step,) = (p.name for p in (tmp_path / "pair" / "checkpoints").glob("[5-9]*"))
    for process in (first, second):
        assert f"stopped: step {step} is saved" in process.text


def test_a_lost_process_ends_the_others(pair, job):
    """Killed: JAX misses it within the heartbeat; its abort is worth a restart, too."""
    first, second = pair(*job, no_data=3, no_pictures=1)
    second.until("no data").kill(signal.SIGKILL)
    began = time.monotonic()
    assert first.status() in (42, -signal.SIGABRT)
    assert time.monotonic() - began < 60


def test_processes_that_do_not_come(start, command, free_port):
    alone = start(
        *command,
        f"--coordinator=127.0.0.1:{free_port()}",
        "--num_processes=2",
        "--process_id=1",
        "--join_seconds=2",
    )
    assert alone.status() == 42
    assert "process 1 of 2 waited 2 s for the others at 127.0.0.1:" in alone.text
