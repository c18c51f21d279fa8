"""Each benchmark on a small network: what it counts, never how fast it is."""

import importlib.util
import json
import math
import sys

import pytest

from benchmarks import quickstart
from benchmarks.gpu import session
from benchmarks.sampling import network_rows
from sra2_jax import config_file
from sra2_jax.config import Config


@pytest.fixture
def small(tiny, as_file):
    tiny.model.depth = tiny.align.teacher.teacher_depth = 1
    return as_file(tiny)


@pytest.fixture
def benchmark(start, tmp_path):
    """benchmark(name, *flags): its text and what it wrote, on one device."""

    def benchmark(name, *flags):
        file = tmp_path / f"{name}.json"
        words = f"benchmarks.{name}", *flags, f"--json={file}"
        done = start(*words, devices=1)
        assert done.status() == 0, done.text
        return done.text, file.read_text()

    return benchmark


@pytest.fixture
def cases(benchmark):
    """Its text and the cases it wrote."""

    def cases(name, *flags):
        text, written = benchmark(name, *flags)
        facts = json.loads(written)
        assert facts["machine"]["devices"] == 1
        return text, facts["cases"]

    return cases


def test_train_step(small, cases):
    flags = [f"--config={small}", "--batch_size=8", "--rounds=2", "--steps=1"]
    text, (vanilla, ours) = cases("train_step", *flags)
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


def test_sizes_of_train_step_are_checked(start):
    done = start("benchmarks.train_step", "--sizes=S,M")
    assert done.status() == 2
    assert done.text == "error: --sizes=S,M: known are S,B,L,XL\n"


def test_sampling(small, cases):
    flags = [f"--config={small}", "--batch_size=8", "--rounds=1"]
    text, rows = cases("sampling", *flags)
    assert [row["network_rows"] for row in rows] == [3, 5, 6, 3]
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


@pytest.mark.parametrize(
    ("accuracy", "frechet", "lines"), [(0.97, 1.1, 0), (0.9, 1.4, 2), (math.nan, 1, 1)]
)
def test_floors_of_the_quickstart(accuracy, frechet, lines):
    scores = {"accuracy": accuracy, "frechet": frechet}
    assert len(quickstart.complaints(scores)) == lines


def test_encoding(cases):
    flags = ["--batch_sizes=1,2", "--batches=2", "--resolution=32", "--channels=32,32"]
    text, rows = cases("encoding", *flags)
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert "32 px, batch 2: " in text


def test_input_pipeline(small, cases):
    flags = [f"--config={small}", "--config.batch_size=8"]
    flags += ["--records=64", "--batches=3", "--rounds=1", "--train", "--steps=1"]
    text, rows = cases("input_pipeline", *flags)
    assert len(rows) == 4
    assert rows[0]["records_per_cpu_second"]["p50"] > 0
    assert rows[2]["records_skipped"] == 64
    assert "of the time with a made-up batch" in text


def test_session_goes_on_after_a_failure(tmp_path, monkeypatch, capfd):
    """Keeps the text of each step, stops one at its limit, and begins none too late."""
    steps = {
        "fails": session.Step("A", 60, "json.tool --nonsense", json=False),
        "hangs": session.Step("A", 1, "http.server 0", json=False),
        "works": session.Step("A", 60, "json.tool --help", json=False),
    }
    monkeypatch.setattr(session, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["session", "A", f"--out={tmp_path}"])
    assert session.main() == 1
    said = capfd.readouterr().out
    assert "== fails: status 2" in said
    assert "== hangs: stopped, 1 s" in said
    assert "== works: ok" in said
    assert said.endswith("failed or left out: fails, hangs\n")
    assert "unrecognized" in (tmp_path / "fails.txt").read_text()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--budget=10"])
    assert session.main() == 1
    assert "== works: left out" in capfd.readouterr().out


@pytest.mark.parametrize("sizes", ["h200", "h100", "smoke"])
def test_steps_of_the_session(sizes, tmp_path):
    """Their flags are known, and their configs can work."""
    values = session.SMOKE if sizes == "smoke" else session.FULL | session.CARDS[sizes]
    for name in session.STEPS:
        _, _, module, *flags = session.command(name, values, tmp_path, 570)
        beside = [f.split()[0] for f in flags if module.endswith("beside")]
        assert all(map(importlib.util.find_spec, [module, *beside]))
        given = dict(f[2:].partition("=")[::2] for f in flags if f.startswith("--"))
        file = given.pop("config", "sra2_s")
        keys = {k[7:]: v for k, v in given.items() if k.startswith("config.")}
        config = config_file.override(file, keys)
        for variant in (f.partition(":")[2] for f in flags if ": " in f):
            words = (word.split("=", 1) for word in variant.split())
            assert config.override(dict(words))


def test_runs_in_one_program(small, benchmark):
    words = f"--config={small}", "--runs=2", "--rounds=1", "--steps=1"
    text, written = benchmark("gpu.seeds", *words)
    assert "2 runs in one program" in text
    (row,) = json.loads(written)["cases"]
    seconds = {name: spread["p50"] for name, spread in row["seconds"].items()}
    assert row["ratio"][0] == pytest.approx(seconds["all"] / (2 * seconds["one"]))


def test_variants(small, benchmark):
    words = [f"--config={small}", "--rounds=1", "--steps=1"]
    words += ["four: batch_size=4 align.vae.enabled=false"]
    _, written = benchmark("gpu.variants", *words)
    (row,) = map(json.loads, written.splitlines())
    assert (row["case"], row["batch_size"]) == ("four", 4)
    assert row["attention"] == "xla"
    assert row["images_per_second"]["p10"] > 0


def test_kernels_and_numerics(small, benchmark):
    flags = [f"--config={small}", "--batch_size=8"]
    text, written = benchmark("gpu.kernels", *flags, "--steps=1")
    found = json.loads(written)
    assert sum(found["kinds"].values()) == pytest.approx(
        sum(found["milliseconds"].values())
    )
    assert "matrix products" in text
    text, written = benchmark("gpu.numerics", *flags, "--tokens=16")
    found = json.loads(written)
    exact, half = found["cases"][:2]
    assert exact["gradient"] < 1e-5 < 1e-3 < half["gradient"] < 0.1
    assert "cuDNN is not detected" in text
    assert found["repeats"]
