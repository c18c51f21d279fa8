"""The whole job on real digits with a tiny network: run, resume, refuse."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sra2_jax.errors import UserError
from sra2_jax.training.checkpoint import Checkpoints
from sra2_jax.training.optim import make_optimizer
from sra2_jax.training.sharding import make_mesh
from sra2_jax.training.state import create_sharded
from sra2_jax.training.train import train


@pytest.fixture(scope="module")
def finished(latents, tmp_path_factory):
    """(config, workdir) of a run of 4 steps that nothing interrupted."""
    from tests.conftest import tiny

    config = tiny.__wrapped__()
    config.data.dir = str(latents)
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(config, str(workdir))
    return config, workdir


@pytest.fixture
def run(finished, tmp_path):
    """The same, cut off before its results were written, as a copy to break."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    return config.copy_and_resolve_references(), tmp_path / "run"


def final_state(config, workdir):
    transform, _ = make_optimizer(**config.optim)
    mesh = make_mesh(-1, 1, config.batch_size)
    abstract, _ = create_sharded(config, transform, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", 3)
    state = jax.device_get(checkpoints.restore(abstract))
    checkpoints.close()
    return state


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(rows):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows]


def test_what_a_run_leaves_behind(finished):
    config, workdir = finished
    steps = [r["step"] for r in rows(workdir) if "loss" in r]
    assert steps == [1, 2, 3, 4]
    first = rows(workdir)[0]
    assert first["loss"] == pytest.approx(
        first["loss_denoise"] + first["loss_align_vae"], rel=1e-5
    )
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
    results = json.loads((workdir / "results.json").read_text())
    assert results["step"] == 4
    assert results["metrics"]["frechet"] > 10 * results["reference"]["real_frechet"]
    assert results["reference"]["reconstruction_accuracy"] > 0.97
    real, decoded, samples = (
        np.asarray(Image.open(workdir / f"{name}.png"), np.float32)
        for name in ("images/real", "images/reconstruction", "samples/step_00000004")
    )
    assert real.shape == decoded.shape == samples.shape
    assert 0 < np.abs(real - decoded).mean() < 20 < np.abs(real - samples).mean()
    assert list((workdir / "tensorboard").glob("events*"))
    assert "Alignment loss" in (workdir / "report.html").read_text()
    kept = {p.name for p in (workdir / "checkpoints").glob("[0-9]*")}
    assert kept == {"2", "4"}
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["jax"] == jax.__version__


def test_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    """Bit for bit: state, logged metrics. Rows after the checkpoint are replaced."""
    config, workdir = finished
    config = config.copy_and_resolve_references()
    config.steps = 2
    train(config, str(tmp_path / "run"))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    config.steps = 4
    train(config, str(tmp_path / "run"))
    jax.tree.map(
        np.testing.assert_array_equal,
        final_state(config, workdir),
        final_state(config, tmp_path / "run"),
    )
    resumed = [r for r in rows(tmp_path / "run") if "loss" in r]
    assert without_speed(resumed) == without_speed(
        [r for r in rows(workdir) if "loss" in r]
    )


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 32}, "run of another model: config.model.width: 16 there, 32"),
        ({"align.vae.head_layers": 3}, "config.align.vae.head_layers: 2 there, 3 now"),
        ({"steps": 3}, "is at step 4, beyond config.steps=3"),
    ],
)
def test_foreign_workdir_is_left_alone(run, changes, message):
    config, workdir = run
    before = snapshot(workdir / "checkpoints")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train(config, str(workdir))
    assert snapshot(workdir / "checkpoints") == before


def test_lost_config_and_foreign_checkpoint(run):
    """A checkpoint is also held against the model itself, array by array."""
    config, workdir = run
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        train(config, str(workdir))
    config.model.width = 32
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match="is of another model: ema/heads/vae/linear_0"):
        train(config, str(workdir))


# Orbax leaves coroutines unawaited when a restore fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damaged_checkpoint(run, damage):
    config, workdir = run
    newest = workdir / "checkpoints" / "4"
    files = [p for p in newest.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    if damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        shutil.rmtree(newest / "state")
    before = snapshot(workdir / "checkpoints")
    with pytest.raises(UserError) as error:
        train(config, str(workdir))
    assert "checkpoints/4 cannot be read" in str(error.value)
    assert "move it away to go on from step 2" in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(workdir / "checkpoints") == before
    del error
    gc.collect()  # here, where their warnings are expected
    shutil.rmtree(newest)
    train(config, str(workdir))  # the way out works
    assert (workdir / "checkpoints" / "4").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.dir": "/nowhere", "data.images": ""}, "no latents dataset in /nowhere"),
        ({"latents.scaling_factor": 1.0}, "config says latents.scaling_factor=1.0"),
        ({"latents.shift_factor": 0.5}, "config says latents.shift_factor=0.5"),
        ({"latents.size": 8}, "config says latents.size=8, dataset was encoded with 4"),
        (
            {"data.num_classes": 9, "eval.proxy": ""},
            "config says data.num_classes=9, dataset was encoded with 10",
        ),
        ({"vae": "/nowhere"}, "/nowhere"),
        ({"batch_size": 12}, "config.batch_size=12 is not divisible by 8 devices"),
    ],
)
def test_refusals(finished, tmp_path, changes, message):
    config, _ = finished
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        train(config, str(tmp_path / "run"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_proxy_metrics(finished, tmp_path):
    """As on ImageNet: decoded records stand for the real images; periodic samples."""
    config, _ = finished
    config = config.copy_and_resolve_references()
    config.eval.proxy, config.steps, config.run.sample_every = "", 2, 1
    config.align.vae.enabled = False
    config.run.checkpoint_every, config.run.keep_checkpoints = 1, 1
    train(config, str(tmp_path / "run"))
    names = {p.name for p in (tmp_path / "run").rglob("*.png")}
    assert names == {"reconstruction.png", "step_00000001.png", "step_00000002.png"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "metrics" not in results
    assert results["method"] == "euler_maruyama"
    assert (tmp_path / "run" / "report.html").exists()
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert kept == ["2"]


def test_a_finished_run_is_left_alone(finished, capsys):
    config, workdir = finished
    before = snapshot(workdir)
    train(config, str(workdir))
    assert "finished at step 4 already" in capsys.readouterr().out
    changed = {p.name for p, b in snapshot(workdir).items() if before.get(p) != b}
    assert changed <= {"versions.json"}
