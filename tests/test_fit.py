"""Does a config fit: the program, on eight simulated CPUs."""

import importlib.util
import json

import jax
import pytest

from sra2_jax import chips
from sra2_jax.config import Config
from sra2_jax.programs import fit
from sra2_jax.sharding import mesh
from sra2_jax.step import Program
from tests.conftest import one_line


def described(config, memory_gb):
    config = Config.of(config)
    devices, chip = chips.find_devices("cpu:8")
    return fit.describe(Program(config, mesh(config, devices)), "", chip, memory_gb)[0]


def test_what_a_device_holds(tiny):
    """Against the parameters' number, with SRA 2, an encoder and a teacher at once,
    which are not trained."""
    tiny.align.encoder.enabled = tiny.align.teacher.enabled = True
    facts = described(tiny, memory_gb=1)
    numbers, held = sum(facts["parameters"].values()), facts["bytes"]
    assert held["parameters"] == held["ema"] == 4 * numbers
    assert 8 * numbers < held["optimizer"] < 8 * numbers + 100  # two moments, a count
    assert held["encoder"] > 0
    # Of 2 rows: mean and std in float16, a label, an image
    assert held["batch"] == 2 * (2 * 4 * 4 * 4 * 2 + 4 + 32 * 32 * 3)
    assert facts["peak_bytes"] > 16 * numbers + held["encoder"] + held["batch"]
    assert facts["fits"] is True


def check_on_too_small_devices(config, start, program, *more):
    """A program that compiles for absent chips. Exit status 1, figures, some more, as
    text and JSON, and last what to change. config: a file of one."""
    file = config.with_name("facts.json")
    flags = [f"--config={config}", "--topology=cpu:8", "--memory_gb=0.0001"]
    done = start(program, *flags, f"--json={file}", devices=8)
    assert done.status() == 1, done.text
    facts = json.loads(file.read_text())
    assert facts["fits"] is False
    *table, last = done.text.splitlines()
    need = f"needs {facts['peak_bytes'] / 1e9:.2f} GB a device of 0.00 GB"
    assert last.startswith(f"does not fit: {need}")
    for hint in ("remat=full", "mesh.fsdp", "batch_size"):
        assert hint in last
    for name in ("parameters", "GB a device", "GFLOP a device", *more):
        assert any(line.startswith(name) for line in table), name


def test_program_says_that_it_does_not_fit(tiny, as_file, start):
    tiny.model.depth = tiny.align.vae.depth = 1
    check_on_too_small_devices(as_file(tiny), start, "fit")


def run_out_of_memory(monkeypatch):
    """What a TPU's compiler raises; it gives no program then."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
                "required for HLO temporaries (27.50G) exceeds available HBM (15.75G)."
            )

    monkeypatch.setattr(Program, "lower", lambda self: Lowered())


def test_compiler_that_runs_out_of_memory(tiny, monkeypatch):
    run_out_of_memory(monkeypatch)
    facts = described(tiny, memory_gb=16)
    assert facts["fits"] is False
    assert facts["peak_bytes"] == 27.5 * 2**30
    assert "needs 29.53 GB a device of 16.00 GB" in fit.advice(facts)
    assert json.dumps(facts)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v7:4x4", "unknown --topology=v7:4x4: known are v4 and v5p: 1x1x1"),
        ("v5e", "unknown --topology=v5e: known are"),
        ("h200:8", "unknown --topology=h200:8: known are"),
        ("cpu:0", "unknown --topology=cpu:0"),
        ("cpu:9", "this process has 8 devices"),
        ("v5e:4x4", "needs the package libtpu: pip install -e '.[aot]'"),
    ],
)
def test_mistakes(topology, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with one_line(message):
        chips.find_devices(topology)


def test_names_that_devices_give_themselves():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H200", "cpu")
    found = [chips.chip_of(kind) for kind in kinds]
    names = [chip and chip.name for chip in found]
    assert names == ["v4", "v5e", "v5p", "v6e", "h200", None]
