"""Two real processes with two simulated devices each: the run of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sra2_jax import runtime
from sra2_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def together(*command, **variables):
    """Run a program in two processes; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
    both = [
        subprocess.Popen(
            [
                sys.executable, *map(str, command), f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2", f"--process_id={i}",
            ],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in both]
    codes = [process.returncode for process in both]
    assert codes == [0, 0], "\n\n".join(text[:3000] for text in said)
    return said


def rows(workdir, key):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if key in r]


def test_two_processes_train_checkpoint_and_sample_as_one(finished, as_file, tmp_path):
    """They go on from step 2 of a run of one process with eight devices that each hold
    all, with the state split over all four devices of both."""
    config, workdir = finished
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    shutil.rmtree(run / "checkpoints" / "4")
    together(
        "main.py", f"--config={as_file(config)}", f"--workdir={run}",
        "--config.mesh.fsdp=4",
    )  # fmt: skip
    ours, alone = rows(run, "loss"), rows(workdir, "loss")
    assert [r["step"] for r in ours] == [1, 2, 3, 4]
    assert ours[:2] == alone[:2]
    assert ours[2:] != alone[2:]
    for a, b in zip(ours, alone, strict=True):
        for key in ("loss", "loss_align_vae", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    scores = rows(run, "eval/frechet")[-1], rows(workdir, "eval/frechet")[-1]
    assert scores[0]["eval/frechet"] == pytest.approx(scores[1]["eval/frechet"], 0.01)

    samples = [tmp_path / "two.npz", tmp_path / "one.npz"]
    program = ["-m", "sra2_jax", "sample", run, "--num=20", f"--out={samples[0]}"]
    said = together(*program)
    assert sum("20 images in" in text for text in said) == 1
    program[-1] = f"--out={samples[1]}"
    subprocess.run([sys.executable, *map(str, program)], cwd=ROOT, check=True)
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
