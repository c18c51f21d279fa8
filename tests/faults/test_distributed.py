"""Two real processes with two simulated devices each: the run of one process."""

import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from sra2_jax import runtime
from sra2_jax.errors import UserError
from sra2_jax.programs import sample
from tests.conftest import write_config
from tests.test_train import rows


def together(both):
    """Wait for two processes; what each of them printed."""
    for process in both:
        assert process.status() == 0, process.text
    return [process.text for process in both]


@pytest.fixture(scope="module")
def job(pair, finished, tmp_path_factory):
    """The words and the workdir of a job of two processes, with the state split over
    all four devices. It went on from step 2 of a run of one process with eight devices
    that each hold all."""
    config, workdir = finished
    folder = tmp_path_factory.mktemp("job")
    run = shutil.copytree(workdir, folder / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    words = f"--config={write_config(folder, config)}", "--config.mesh.fsdp=4"
    together(pair(*words, f"--workdir={run}", no_report=1))
    return words, run


@pytest.fixture
def long(job, tmp_path):
    """The words of the same job on a copy, which is to go on for long."""
    words, run = job
    run = shutil.copytree(run, tmp_path / "run")
    more = "--config.steps=100", "--heartbeat_seconds=6", f"--workdir={run}"
    return [*words, *more], run


@pytest.mark.timeout(600)  # of a busy machine
def test_two_processes_train_checkpoint_and_sample_as_one(
    pair, job, finished, tmp_path, monkeypatch
):
    _, run = job
    ours, alone = ([r for r in rows(w) if "loss" in r] for w in (run, finished[1]))
    assert [r["step"] for r in ours] == [1, 2, 3, 4]
    assert ours[:2] == alone[:2]
    assert ours[2:] != alone[2:]
    for a, b in zip(ours, alone, strict=True):
        for key in ("loss", "loss_align_vae", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    two, one = (
        [r["eval/frechet"] for r in rows(w) if "eval/frechet" in r][-1]
        for w in (run, finished[1])
    )
    assert two == pytest.approx(one, 0.01)

    program = "sample", str(run), "--num=20"
    said = together(pair(*program, f"--out={tmp_path}/two.npz"))
    assert sum("20 images in" in text for text in said) == 1
    monkeypatch.setattr("sys.argv", [*program, f"--out={tmp_path}/one.npz"])
    sample.main()
    two, one = (
        np.load(tmp_path / name)["arr_0"].astype(int) for name in ("two.npz", "one.npz")
    )
    assert np.abs(two - one).max() <= 1


def test_sigterm_to_one_of_two_stops_both(pair, long):
    """At the same step, which is saved."""
    words, run = long
    first, second = pair(*words, slow_steps=0.1, no_pictures=1)
    second.until(lambda: rows(run)[-1]["step"] >= 6).kill()
    assert [first.status(), second.status()] == [42, 42]
    step = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert step > 6
    for process in (first, second):
        assert f"stopped: step {step} is saved" in process.text


def test_a_lost_process_ends_the_others(pair, long):
    """Killed: JAX misses it within the heartbeat; its abort is worth a restart, too."""
    first, second = pair(*long[0], no_data=1, no_pictures=1)
    second.until("no data").kill(signal.SIGKILL)
    began = time.monotonic()
    assert first.status() in (42, -signal.SIGABRT)
    assert time.monotonic() - began < 60


def test_processes_that_do_not_come(start, command, free_port):
    join = f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"
    alone = start(*command, *join, "--process_id=1", "--join_seconds=1")
    assert alone.status() == 42
    assert "process 1 of 2 waited 1 s for the others at 127.0.0.1:" in alone.text


def test_flags():
    def initialize(**flags):
        keys = ("coordinator", "num_processes", "process_id")
        arguments = dict.fromkeys(keys) | {"distributed": False, "join_seconds": 9}
        arguments |= {"heartbeat_seconds": 9} | flags
        runtime.join(SimpleNamespace(**arguments))

    initialize()  # one process: nothing to do
    with pytest.raises(UserError, match="go together"):
        initialize(coordinator="127.0.0.1:1")
    with pytest.raises(UserError, match="give --coordinator=HOST:PORT"):
        initialize(distributed=True)
