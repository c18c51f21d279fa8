"""Two real processes with two simulated devices each: the run of one process."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from sra2_jax import runtime
from sra2_jax.errors import UserError
from tests.test_train import rows


def together(pair, *words):
    """Run a program in two processes; what each of them printed."""
    both = pair(*words)
    for process in both:
        assert process.status() == 0, process.text
    return [process.text for process in both]


@pytest.mark.timeout(600)  # of a busy machine
def test_two_processes_train_checkpoint_and_sample_as_one(
    start, pair, finished, as_file, tmp_path
):
    """They go on from step 2 of a run of one process with eight devices that each hold
    all, with the state split over all four devices of both."""
    config, workdir = finished
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    shutil.rmtree(run / "checkpoints" / "4")
    words = f"--config={as_file(config)}", f"--workdir={run}", "--config.mesh.fsdp=4"
    together(pair, *words)
    ours, alone = ([r for r in rows(w) if "loss" in r] for w in (run, workdir))
    assert [r["step"] for r in ours] == [1, 2, 3, 4]
    assert ours[:2] == alone[:2]
    assert ours[2:] != alone[2:]
    for a, b in zip(ours, alone, strict=True):
        for key in ("loss", "loss_align_vae", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    two, one = (
        [r["eval/frechet"] for r in rows(w) if "eval/frechet" in r][-1]
        for w in (run, workdir)
    )
    assert two == pytest.approx(one, 0.01)

    samples = [tmp_path / "two.npz", tmp_path / "one.npz"]
    program = "sample", run, "--num=20"
    said = together(pair, *program, f"--out={samples[0]}")
    assert sum("20 images in" in text for text in said) == 1
    alone = start(*program, f"--out={samples[1]}", devices=8)
    assert alone.status() == 0, alone.text
    two, one = (np.load(path)["arr_0"].astype(int) for path in samples)
    assert np.abs(two - one).max() <= 1


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
