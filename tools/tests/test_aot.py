"""What a compiled program does, on eight simulated CPUs, and the committed figures."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from sra2_jax import chips
from sra2_jax.config import Config, Model
from sra2_jax.errors import UserError
from tests.conftest import one_line, pinned
from tests.test_fit import check_on_too_small_devices, run_out_of_memory
from tools import absent_gpu, aot, gates, hlo, roofline


def test_what_a_device_does(tiny):
    """Against the passes counted by formula, with SRA 2, an encoder and a teacher at
    once, which are not trained."""
    tiny.model.scan = False
    tiny.align.encoder.enabled = tiny.align.teacher.enabled = True
    facts = aot.describe(Config.of(tiny), "cpu:8", memory_gb=1)
    numbers = sum(facts["parameters"].values())
    assert facts["estimate"] is None  # a CPU has no nominal speed
    program = facts["program"]
    # The first layers need no gradient of their input.
    assert 0.9 < 8 * program["matmul_flops"] / facts["flops_formula"] < 1
    reduced = program["collectives"]["all-reduce f32"]["bytes"]
    assert 4 * numbers <= reduced < 4 * numbers + 100
    with pytest.raises(UserError, match="batch_size=16 is not divisible by 7 devices"):
        aot.describe(Config.of(tiny), "cpu:7")


def test_program(tiny, as_file, start):
    tiny.model.depth = tiny.align.vae.depth = 1
    more = "products", "GB moved", "all-reduce f32"
    check_on_too_small_devices(as_file(tiny), start, "tools.aot", *more)


def test_a_compiler_that_gives_no_program(tiny, monkeypatch):
    run_out_of_memory(monkeypatch)
    facts = aot.describe(Config.of(tiny), "cpu:8", memory_gb=16)
    assert facts["fits"] is False
    assert facts["program"] is facts["estimate"] is None
    assert json.dumps(facts)


def test_a_gpu_needs_its_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with one_line("plugin and ptxas: pip install -e '.[aot-gpu]'"):
        aot.find_devices("h200:8")


def test_absent_gpu_runs_attention_of_cudnn():
    """JAX writes its calls, forward and backward, for a GPU that is not there."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 72), jnp.bfloat16)

    def lowered():
        def loss(q):
            out = jax.nn.dot_product_attention(q, q, q, implementation="cudnn")
            return out.astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss)).trace(q)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(RuntimeError, match="cuDNN"):
        lowered()
    with absent_gpu.present():
        text = lowered()
    assert absent_gpu.attention(Model()) == "cudnn"
    assert absent_gpu.attention(Model(dtype="float32")) == "xla"
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert text.count("__cudnn$fmhaSoftmax") == 2


def test_estimate():
    """A roofline worked by hand, on a made-up chip."""
    chip = chips.Chip("made up", flops=1000, bandwidth=100, links=10, memory=1)
    counts = hlo.Counts()
    # 800 FLOPs at 80% of 1,000: 1 s, twice; 180 bytes at 90% of 100: 2 s
    counts.products = [(800, 9, 2), (8, 180, 1)]
    counts.traffic.update(elementwise=45, copy=45, matmul=198, collective=60)  # 1 s
    counts.collective_bytes.update(
        {("all-reduce", "f32"): 20, ("all-gather", "f32"): 40}
    )
    facts = roofline.estimate(counts, flops=6000, chip=chip, devices=4)
    assert facts["matmul_seconds"] == pytest.approx(4)
    assert facts["memory_seconds"] == pytest.approx(1)
    assert facts["collective_seconds"] == pytest.approx((2 * 20 + 40) * 3 / 4 / 10)
    assert facts["step_seconds_hidden"] == pytest.approx(6)
    assert facts["mfu_exposed"] == pytest.approx(6000 / 4000 / 11)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pinned
def test_committed_figures(tmp_path):
    """One of the committed cases: what is compiled now is no larger; and a figure that
    was smaller is named."""
    case = json.loads(gates.GATES.read_text())["cpu-fsdp8-unrolled"]
    case["figures"]["all-gather f32 bytes"] /= 1.04
    file = tmp_path / "gates.json"
    file.write_text(json.dumps({"cpu-fsdp8-unrolled": case}))
    grown = gates.gate(file, "cpu:8")
    assert len(grown) == 1, grown
    assert grown[0].startswith("cpu-fsdp8-unrolled: all-gather f32 bytes grew from")


def test_gate_figures_that_are_new_or_old(tmp_path):
    known = {"matmuls": 100, "all-reduce f32 count": 4}
    assert not gates.compare({"matmuls": 103, "all-reduce f32 count": 1}, known)
    assert gates.compare({"matmuls": 104, "all-gather bf16 count": 1}, known) == [
        "matmuls grew from 100 to 104",
        "all-gather bf16 count grew from 0 to 1",
    ]
    file = tmp_path / "gates.json"
    file.write_text(json.dumps({"case": {"topology": "cpu:8", "compiler": "jax 0"}}))
    with pytest.raises(UserError, match="case was recorded with jax 0, this is jax"):
        gates.gate(file, "cpu:8")
    with pytest.raises(UserError, match="no case of --topology=cpu:4"):
        gates.gate(file, "cpu:4")
