"""Each benchmark on a small network: what it counts, never how fast it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.sampling import network_rows
from sra2_jax import command, config_file
from sra2_jax.config import Config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tiny, as_file):
    tiny.model.depth = tiny.align.teacher.teacher_depth = 1
    return as_file(tiny)


def benchmark(name, folder, *flags):
    """Its text and the cases it wrote; on one device."""
    file = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags, f"--json={file}"]
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(file.read_text())
    assert facts["machine"]["devices"] == 1
    return done.stdout, facts["cases"]


def test_train_step(small, tmp_path):
    flags = [f"--config={small}", "--batch_size=8", "--rounds=2", "--steps=1"]
    text, (vanilla, ours) = benchmark("train_step", tmp_path, *flags)
    assert (vanilla["method"], ours["method"]) == ("vanilla", "sra2")
    assert ours["gflops_per_image"] > vanilla["gflops_per_image"]
    for row in (vanilla, ours):
        speed = row["images_per_second"]
        assert 0 < speed["p10"] <= speed["p50"] <= speed["p90"]
        made = speed["p50"] * row["gflops_per_image"] / 1e3
        assert row["tflops"] == pytest.approx(made)
        assert row["mfu_matmul"] == pytest.approx(made / row["matmul_tflops"])
        assert row["mfu_nominal"] is None  # a CPU has no nominal speed
        assert 0 < row["dispatch_seconds"]["p50"] <= row["step_seconds"]["p90"]
    assert "sra2 / vanilla time: " in text


def test_sizes_of_train_step_are_checked(small):
    command = [sys.executable, "-m", "benchmarks.train_step", "--sizes=S,M"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --sizes=S,M: known are S,B,L,XL\n"


def test_sampling(small, tmp_path):
    flags = [f"--config={small}", "--batch_size=8", "--rounds=1"]
    text, rows = benchmark("sampling", tmp_path, *flags)
    assert [row["network_rows"] for row in rows] == [3, 5, 6]
    assert rows[2]["time_over_guided"] == 1
    assert "guided in [0, 0.7]" in text


def test_network_rows():
    """At the reference's 250 steps of the SDE the interval spares 15% of the work."""

    def rows(**given):
        return network_rows(
            Config().override({f"sampling.{k}": given[k] for k in given})
        )

    assert rows(guidance=1.8) == 500
    # 249 times from 1 to 0.04 in steps of 0.96 / 249, then 0.04: 172 lie in [0, 0.7].
    inside = sum(1 - i * 0.96 / 249 <= 0.7 for i in range(250))
    assert rows(guidance=1.8, guidance_high=0.7) == 250 + inside
    assert rows(method="heun") == 499


def test_encoding(tmp_path):
    flags = ["--batch_sizes=1,2", "--batches=2", "--resolution=32", "--channels=32,32"]
    text, rows = benchmark("encoding", tmp_path, *flags)
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert "32 px, batch 2: " in text


def test_input_pipeline(small, tmp_path):
    flags = [f"--config={small}", "--config.batch_size=8"]
    flags += ["--records=64", "--batches=3", "--rounds=1", "--train", "--steps=1"]
    text, rows = benchmark("input_pipeline", tmp_path, *flags)
    assert len(rows) == 4
    assert rows[0]["records_per_cpu_second"]["p50"] > 0
    assert rows[2]["records_skipped"] == 64
    assert "of the time with a made-up batch" in text


def test_suite_goes_on_after_a_failure(tmp_path, monkeypatch, capfd):
    """And keeps the text of each command."""
    commands = {"verify": "json.tool --nonsense", "encoding": "json.tool --help"}
    monkeypatch.setattr(suite, "COMMANDS", commands)
    monkeypatch.setattr(sys, "argv", ["suite", f"--out={tmp_path}"])
    assert suite.main() == 1
    said = capfd.readouterr().out
    assert "== verify: status 2" in said
    assert "== encoding: ok" in said
    assert said.endswith("failed: verify\n")
    assert "unrecognized" in (tmp_path / "verify.txt").read_text()


@pytest.mark.parametrize("name", [k for k in suite.COMMANDS if k.startswith("train")])
def test_flags_of_the_suite(name):
    """They make a config that can work; the other programs take the same ones."""
    flags = [flag.removeprefix("--") for flag in suite.COMMANDS[name].split()[1:]]
    file = next((f[7:] for f in flags if f.startswith("config=")), "sra2_s")
    overrides = (f[7:] for f in flags if f.startswith("config."))
    assert config_file.load(file, *overrides)


def test_flags_of_xla(monkeypatch):
    """XLA knows them (it aborts otherwise), and the user's own come last."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    command.set_xla_flags()
    words = os.environ["XLA_FLAGS"].split()
    assert words == [*command.GPU_FLAGS, "--xla_gpu_autotune_level=0"]
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.92"
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"
