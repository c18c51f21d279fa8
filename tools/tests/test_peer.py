"""The PyTorch comparison, with stand-ins for PyTorch's interpreter."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peer_jax import Worker
from tests.test_reference import read

# Answers like a peer that computes FACTOR times what ours does, and takes as many
# seconds as its answers so far.
STAND_IN = """#!{python}
import json, pathlib, sys
import numpy as np

assert sys.argv[1:] == ["-m", "benchmarks.peer_worker", "torch"]
runs, nan = 0, float("nan")
for line in sys.stdin:
    request = json.loads(line)
    answer = dict(device="cpu", name="cpu", text="stand-in 1.0")
    if request["do"] == "check":
        with np.load(request["weights"], allow_pickle=False) as file:
            assert file["weight/blocks.1.mlp.fc2.weight"].shape == (16, 64)
        ours = np.load(pathlib.Path(request["out"]).with_name("ours.npz"))
        factors = {factors}
        np.savez(request["out"], **{{k: factors.get(k, 1) * ours[k] for k in ours}})
    if request["do"] == "prepare":
        with np.load(request["batch"], allow_pickle=False) as file:
            assert file["mean"].shape == (8, 4, 4, 4)
    if request["do"] == "run":
        runs += 1
        answer = dict(seconds=runs, cpu_seconds=2 * runs, loss=0.5, peak_bytes=None)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def config(tiny, as_file) -> Path:
    tiny.batch_size = 64
    return as_file(tiny)


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def stand_in(tmp_path: Path, **factors: float) -> Path:
    text = STAND_IN.format(python=sys.executable, factors=factors)
    return program(tmp_path / "python", text)


@pytest.fixture
def peer(start, config):
    """peer(*flags): its exit status and what it printed."""

    def peer(*flags):
        done = start("benchmarks.peer", f"--config={config}", *flags, devices=1)
        return done.status(), done.text

    return peer


def test_ratios_are_of_the_same_round(peer, tmp_path):
    status, said = peer(
        "--batch_size=8", "--rounds=3", "--steps=1", "--modes=ours,eager",
        f"--torch_python={stand_in(tmp_path)}", f"--json={tmp_path}/peer.json",
    )  # fmt: skip
    assert status == 0, said
    assert "eager agrees with ours to 0" in said
    rows = [json.loads(x) for x in (tmp_path / "peer.json").read_text().splitlines()]
    ours, eager = rows
    assert (ours["mode"], ours["dtype"], ours["batch_size"]) == ("ours", "float32", 8)
    assert ours["time_over_ours"] == [1, 1, 1]
    assert 0 < ours["loss"] < 20
    assert eager["seconds"] == [2, 1, 3]
    assert eager["cpu_seconds"] == [4, 2, 6]
    assert eager["images_per_second"] == pytest.approx([4, 8 / 3, 8])
    assert "stand-in 1.0" in eager["versions"]
    # The peer's 1, 2 and 3 seconds over what ours took in rounds 1, 2 and 3.
    _, fast, slow = ours["seconds"]
    assert 3 / slow <= eager["time_over_ours"][2] <= 3 / fast
    assert 1 / slow <= eager["time_over_ours"][1] <= 1 / fast


@pytest.mark.parametrize(
    ("factors", "off"),
    [
        ({"velocity": 1.0002}, "its velocity is 0.0002 off"),
        ({"grad_norm": float("nan")}, "its grad_norm is nan off"),
    ],
)
def test_another_program_is_not_timed(peer, tmp_path, factors, off):
    python = stand_in(tmp_path, **factors)
    status, said = peer("--batch_size=8", f"--torch_python={python}")
    assert status == 1
    (error,) = (line for line in said.splitlines() if line.startswith("error:"))
    assert error.startswith("error: eager is not the same program as ours: " + off)
    assert said.endswith(f"{error}\n")
    assert "images_per_second" not in said


def test_missing_torch_is_one_line(peer, tmp_path):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    python = program(
        tmp_path / "python",
        f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n',
    )
    assert peer(f"--torch_python={python}") == (
        2,
        f"error: {python} has no torch: --torch_python=PATH names an interpreter "
        "that has it, --modes=ours does without\n",
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--torch_python=/missing/python"], "/missing/python does not start: "),
        (["--modes=eager"], "--modes must name ours"),
        (["--config.transport.path=gvp"], "config.transport.path='gvp': the peer has"),
    ],
)
def test_mistakes_are_one_line(peer, flags, line):
    status, said = peer(*flags)
    assert status == 2
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_no_weight_of_the_check_is_zero(tiny, tmp_path):
    """Else the parts that begin at zero would hide what they multiply."""
    files = {"weights": f"{tmp_path}/weights.npz", "out": f"{tmp_path}/ours.npz"}
    Worker().check(tiny.to_dict(), **files)
    with np.load(files["weights"], allow_pickle=False) as file:
        weights = {k[7:]: file[k] for k in file.files if k.startswith("weight/")}
        labels = file["input/y"]
    assert tiny.data.num_classes in labels
    assert read(weights, tiny)[1].keys() == {"vae"}
    for name, weight in weights.items():
        if name != "pos_embed":
            assert np.all(weight), name
    with np.load(files["out"], allow_pickle=False) as file:
        assert np.abs(file["velocity"]).mean() > 0.1
        assert file["grad_norm"] > 0.1
