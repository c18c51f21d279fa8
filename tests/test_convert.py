"""Checkpoints in and out, bit for bit; a run that goes on from an imported one."""

import argparse
import contextlib
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Config
from sra2_jax.models.dit import sincos_positions
from sra2_jax.programs import convert
from sra2_jax.programs.convert import export_run, import_file
from sra2_jax.run import Run
from sra2_jax.train import train
from sra2_jax.weights import files
from sra2_jax.weights.files import read_file
from tests.conftest import one_line
from tests.faults.driver import Blind
from tests.test_reference import assert_same, golden_weights, random_weights


def program(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


# ml_collections loads a config file so.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_golden_file_goes_in_and_out_unchanged(golden, tmp_path, monkeypatch, capsys):
    """The programs themselves, on weights in float16; other files are
    test_reference's."""
    weights = golden_weights(golden, "sit_learn_sigma")
    np.savez(tmp_path / "in.npz", **weights, steps=7)
    settings = (
        "latents.size=8", "model.patch_size=2", "model.width=64", "model.depth=2",
        "model.learn_sigma=true", "align.vae.enabled=false",
    )  # fmt: skip
    program(
        monkeypatch, "import", tmp_path / "in.npz", f"--workdir={tmp_path / 'run'}",
        "--config=configs/digits.py", *(f"--config.{s}" for s in settings),
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "in.npz: step 7\n  unnamed weights, taken for both raw and ema\n" in said
    assert "config.model.heads=4: the file does not say" in said
    assert "--reverse_time" in said
    out = tmp_path / "out.safetensors"
    program(monkeypatch, "export", tmp_path / "run", f"--out={out}", "--heads")
    assert_same(load_file(out), weights)
    with safe_open(out, "numpy") as file:
        notes = file.metadata()
    assert (notes["step"], notes["weights"], notes["num_heads"]) == ("7", "ema", "4")
    assert not read_file(out).reverse
    out = f"--out={tmp_path}/turned.npz"
    program(monkeypatch, "export", tmp_path / "run", out, "--reverse_time")
    kernel = np.load(tmp_path / "turned.npz")["final_layer.linear.weight"]
    np.testing.assert_array_equal(kernel, -weights["final_layer.linear.weight"])


def test_training_goes_on_from_an_imported_checkpoint(finished, tmp_path, monkeypatch):
    """With no steps left it only samples; then it has the very loss of the run that the
    weights came from."""
    tiny, workdir = finished
    merged = {}
    for prefix, name in files.SETS.items():
        out = tmp_path / f"{name}.safetensors"
        export_run(str(workdir), out, name, step=2, heads=True)
        merged |= {f"{prefix}.{k}": v for k, v in load_file(out).items()}
    save_file(merged, tmp_path / "both.safetensors", {"step": "2"})
    imported, sampled = tmp_path / "run", []
    import_file(tmp_path / "both.safetensors", str(imported), tiny)

    class Sampling(Blind):
        def finish(self, step, params):
            sampled.append(step)

    monkeypatch.setattr("sra2_jax.train.Observer", Sampling)
    for steps in (2, 3):
        train(tiny.override({"steps": steps}), str(imported))
    assert sampled == [2, 3]
    first, second = (
        [row for row in run.rows() if "loss" in row]
        for run in (Run(workdir), Run(imported))
    )
    assert [r["step"] for r in second] == [3]
    for key in ("loss", "loss_align_vae", "grad_norm", "learning_rate"):
        assert second[0][key] == first[2][key]


@pytest.fixture
def torch(monkeypatch):
    """Stands in for PyTorch; its load gives `answer`, or raises it."""

    def load(path, *, map_location, weights_only, mmap):
        assert weights_only is True
        if isinstance(torch.answer, Exception):
            raise torch.answer
        return torch.answer

    def safe_globals(classes):
        assert classes == [argparse.Namespace]
        return contextlib.nullcontext()

    serialization = SimpleNamespace(safe_globals=safe_globals)
    torch = SimpleNamespace(load=load, serialization=serialization)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_every_kind_of_file_reads_the_same(tmp_path, torch):
    a, b = (np.full(3, n, np.float16) for n in range(2))
    tree = {"model": {"a": a}, "ema": {"a": b}, "steps": 3}
    beside = {"opt": {"state": {}}, "args": argparse.Namespace(), "epoch": 1}
    torch.answer = {"state_dict": tree | beside}
    flat = {"model.a": a, "ema_model.a": b}
    np.savez(tmp_path / "in.npz", **flat, steps=3)
    save_file(flat, tmp_path / "in.safetensors", {"step": "3"})
    for suffix in (".npz", ".safetensors", ".pt", ".pth", ".ckpt"):
        path = tmp_path / f"in{suffix}"
        path.touch()
        contents = read_file(path)
        assert contents.step == 3
        assert contents.sets.keys() == {"raw", "ema"}
        np.testing.assert_array_equal(contents.sets["raw"]["a"], a)
        np.testing.assert_array_equal(contents.sets["ema"]["a"], b)


def refused(path, config, run, **flags):
    """The one line that an import is refused with; it leaves nothing."""
    before = sorted(run.parent.rglob("*"))
    with one_line() as error:
        import_file(path, str(run), Config.of(config), **flags)
    assert sorted(run.parent.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.depth": 3}, "blocks.2.adaLN_modulation.1.bias is missing, (96,) exp"),
        ({"model.mlp_ratio": 2.0}, "blocks.0.mlp.fc1.bias is (64,), (32,) expected"),
        (
            {"data.num_classes": 11, "eval.features": ""},
            "y_embedder.embedding_table.weight is (11, 16), (12, 16) expected",
        ),
        ({"model.heads": 4}, "--config.model.heads=2 (now 4)"),
        ({"align.vae.head_width": 8}, "sra2_head.0.bias is (32,), (8,) expected"),
        ({"steps": 2}, "step 3 must lie between 1 and config.steps=2"),
    ],
)
def test_configs_that_do_not_fit(changes, message, tiny, tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(random_weights(tiny, 0), path, {"step": "3", "num_heads": "2"})
    tiny.update_from_flattened_dict(changes)
    (tmp_path / "runs").mkdir()
    assert message in refused(path, tiny, tmp_path / "runs" / "run")


def test_damaged_and_foreign_files(tiny, tmp_path):
    weights = random_weights(tiny, 0)
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "run"
    np.savez(tmp_path / "in.npz", **weights)
    save_file(weights, tmp_path / "in.safetensors")
    for path in (tmp_path / "in.npz", tmp_path / "in.safetensors"):
        for data in (path.read_bytes()[:-1000], pickle.dumps(weights), b""):
            path.write_bytes(data)
            assert "fetch it again" in refused(path, tiny, run)
    path, none = tmp_path / "in.npz", tmp_path / "weights.bin"
    np.savez(path, a=np.array([{}], object))
    assert "fetch it again" in refused(path, tiny, run)
    np.savez(path, a=np.zeros(3, np.float32))
    assert f"{path}: no SiT of this config" in refused(path, tiny, run)
    assert "step 0" in refused(path, tiny, run, step=0)
    np.savez(path, **{"model.a": np.zeros(3), "loss.b": np.ones(3)})
    assert "loss.b and 0 more tensors are in none of" in refused(path, tiny, run)
    none.touch()
    assert "not one of .npz" in refused(none, tiny, run)
    assert "no such file" in refused(tmp_path / "none.npz", tiny, run)


def test_what_torch_refuses(tiny, tmp_path, torch, monkeypatch):
    path, run = tmp_path / "in.pt", tmp_path / "run"
    path.touch()
    long = "advice " * 99 + "\nWeightsUnpickler error: Unsupported global: os.system"
    for torch.answer, said in (
        (pickle.UnpicklingError(long), "(ValueError: Unsupported global: os.system)"),
        (EOFError("Ran out of input"), "EOFError: Ran out of input"),
        ([1, 2], "expected (frozen)dict"),
        ({"lr": 0.1}, "no SiT of this config"),
    ):
        assert said in refused(path, tiny, run)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install -e '.[torch]'" in refused(path, tiny, run)


def test_nothing_is_overwritten_or_left_half(finished, tiny, tmp_path, monkeypatch):
    path, run = tmp_path / "in.npz", tmp_path / "runs" / "run"
    np.savez(path, **random_weights(tiny, 0))
    (tmp_path / "runs").mkdir()

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", full)
        assert "No space left" in refused(path, tiny, run)
        run.mkdir()
        (run / "config.json").write_text("{}")
        patch.setattr(Checkpoints, "save", full)
        assert "No space left" in refused(path, tiny, run)
    for taken in (finished[1], path):
        assert "holds checkpoints already" in refused(path, tiny, taken)

    def export_refused(out, said, **flags):
        before = sorted(tmp_path.rglob("*"))
        with one_line(said):
            export_run(str(finished[1]), out, **flags)
        assert sorted(tmp_path.rglob("*")) == before

    export_refused(path, "exists already")
    export_refused(tmp_path / "a.pt", "must end in .safetensors or .npz")
    export_refused(tmp_path / "a.npz", "no checkpoint of step 9", step=9)
    export_refused(
        tmp_path / "a.npz", "no weights '0.9': the run has ema", weights="0.9"
    )
    monkeypatch.setattr(files, "save_file", full)
    export_refused(tmp_path / "a.safetensors", "No space left")


def test_fine_tuning(tiny, tmp_path, capsys):
    """To other classes, another resolution and another head: new labels, but the null
    label and all else is kept, raw and EMA apart."""
    tiny.update_from_flattened_dict({"data.num_classes": 5, "eval.features": ""})
    sets = {"raw": random_weights(tiny, 0), "ema": random_weights(tiny, 1)}
    flat = {f"model.module.{k}": v for k, v in sets["raw"].items()}
    flat |= {f"ema/_orig_mod.{k}": v for k, v in sets["ema"].items()}
    np.savez(tmp_path / "in.npz", steps=3, **flat)
    changes = {"data.resolution": 64, "latents.size": 8, "align.vae.enabled": False}
    tiny.update_from_flattened_dict(changes | {"align.encoder.enabled": True})
    tiny.ema_others = (0.5,)
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    path = tmp_path / "in.npz"
    assert "--config.latents.size=4" in refused(path, tiny, run, classes=7)
    import_file(path, str(run), Config.of(tiny), classes=7, resize=True)
    said = capsys.readouterr().out
    assert "in.npz: step 3\n  raw and ema weights\n" in said
    assert "config.align.vae: left out" in said
    assert "config.align.encoder: not in the file, initialised afresh" in said
    assert Run(run).config().data.num_classes == 7
    heads = {}
    for name, key in (("raw", "raw"), ("ema", "ema"), ("0.5", "ema")):
        out = tmp_path / f"{name}.npz"
        export_run(str(run), out, name, heads=True)
        found, weights = dict(np.load(out)), dict(sets[key])
        names = [k for k in found if k.startswith("projectors.0.")]
        heads[name] = {k: found.pop(k) for k in names}
        table, old = (
            w.pop("y_embedder.embedding_table.weight") for w in (found, weights)
        )
        assert table.shape == (8, 16)
        np.testing.assert_array_equal(table[-1], old[-1])
        assert not np.isclose(table[:-1, None], old).all(-1).any()
        assert 0.01 < table[:-1].std() < 0.03  # as SiT's begin
        positions = found.pop("pos_embed")
        np.testing.assert_allclose(positions[0], sincos_positions(16, 8), atol=1e-6)
        rest = {
            k: v for k, v in weights.items() if "head" not in k and k != "pos_embed"
        }
        assert_same(found, rest)
    assert heads["raw"]
    assert_same(heads["raw"], heads["ema"])
