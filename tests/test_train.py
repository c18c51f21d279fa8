"""The whole job on real digits with a tiny network: run, resume, refuse."""

import io
import json
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.chips import Chip
from sra2_jax.config import Config
from sra2_jax.data.digits import load_digits
from sra2_jax.data.pixels import decode_rgb
from sra2_jax.log import Log
from sra2_jax.metrics.features import make_features
from sra2_jax.metrics.moments import kernel_distance
from sra2_jax.observe import Observer
from sra2_jax.programs import sample
from sra2_jax.run import Run
from sra2_jax.runtime import keep_compiled
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from sra2_jax.train import mfu, train
from tests.conftest import one_line
from tests.test_checkpoint import flip


@pytest.fixture
def run(finished, tmp_path):
    """The same as a copy to break: killed while it scored step 2, with its last
    checkpoint damaged; the log goes further, and is torn."""
    config, workdir = finished
    run = shutil.copytree(workdir, tmp_path / "run")
    (run / "results.json").unlink()
    logged = [r for r in rows(run) if r["step"] <= 2 and "loss" in r]
    lines = [*map(json.dumps, logged), '{"step": 3, "loss": 99.0}', '{"step": 4, "lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    for path in (run / "checkpoints" / "4").glob("state/**/*"):
        if path.is_file():
            flip(path)
    return config, run


def final_state(config, workdir):
    config = config if isinstance(config, Config) else Config.of(config)
    program = Program(config, make_mesh())
    with Checkpoints(Run(workdir)) as checkpoints:
        return jax.device_get(checkpoints.restore(program.abstract))


def rows(workdir, name="metrics"):
    lines = (workdir / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


PICTURE = np.arange(90, dtype=np.uint8).reshape(6, 5, 3)


def logged(workdir, clu):
    """What TensorBoard itself reads of two rows and a picture."""
    with Log(Run(workdir), Config().override({"run.clu": clu})) as log:
        log.restart(0)
        for step in (1, 300):
            log.scalars(step, {"loss": 1 / step, "eval/fid": 7.0})
        log.image(2, "samples", PICTURE)
    return EventAccumulator(str(workdir / "tensorboard")).Reload()


def test_mfu(tmp_path, monkeypatch):
    """FLOPs of a second over what the devices could do, where that is known."""
    program = Program(Config(), make_mesh())
    assert mfu(program) == 0.0  # of CPUs
    chip = Chip("made up", flops=1e12, bandwidth=1, links=1, memory=1)
    monkeypatch.setattr("sra2_jax.train.chip_of", lambda kind: chip)
    whole = mfu(program)
    assert whole == pytest.approx(program.flops() / 256 / 8e12)
    config = Config().override({"run.log_every": 1})
    with Log(Run(tmp_path), config, whole) as log:
        log.restart(0)
        log.step(1, {"loss": 1.0, "skipped": 0.0})
    (row,) = rows(tmp_path)
    assert row["mfu"] == pytest.approx(whole * row["images_per_second"])


def test_tensorboard_reads_the_rows(tmp_path):
    found = logged(tmp_path, False)
    assert found.Tags()["scalars"] == ["loss", "eval/fid"]
    for row, step in zip(found.Scalars("loss"), (1, 300), strict=True):
        assert (row.step, row.value) == (step, np.float32(1 / step))
    (image,) = found.Images("samples")
    assert (image.step, image.width, image.height) == (2, 5, 6)
    read = decode_rgb(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(read, PICTURE)


def test_tensorboard_through_clu(start, tmp_path):
    """In a process where TensorBoard has not missed TensorFlow yet: `main`."""
    done = start("tests.test_train", tmp_path)
    assert done.status() == 0, done.text


def main():
    found = logged(Path(sys.argv[1]), True)
    assert found.Tags()["tensors"] == ["loss", "eval/fid", "samples"]
    assert [row.step for row in found.Tensors("loss")] == [1, 300]


def without_speed(rows):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows]


def test_the_readmes_lines_of_python(finished, as_file, tmp_path):
    """They end, with the numbers that main.py logs."""
    config, workdir = finished
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (lines,) = re.findall("```python\n(import sra2_jax.*?)```", text, re.DOTALL)
    script = tmp_path / "lines.py"
    script.write_text(re.sub(r"load\(.*\)", f"load({str(as_file(config))!r})", lines))
    found = runpy.run_path(str(script))
    assert int(found["state"].step) == 4
    last = next(r for r in rows(workdir) if r["step"] == 4 and "loss" in r)
    assert float(found["metrics"]["loss"]) == last["loss"]
    assert found["images"].shape == (3, 32, 32, 3)


def test_what_a_run_leaves_behind(finished):
    config, workdir = finished
    steps = [r["step"] for r in rows(workdir) if "loss" in r]
    assert steps == [1, 2, 3, 4]
    first = rows(workdir)[0]
    assert first["loss"] == pytest.approx(
        first["loss_denoise"] + first["loss_align_vae"], rel=1e-5
    )
    assert Config.of(json.loads((workdir / "config.json").read_text())) == config
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
    assert "Alignment loss" in (workdir / "report.html").read_text()
    kept = {p.name for p in (workdir / "checkpoints").glob("[0-9]*")}
    assert kept == {"2", "4"}
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["jax"] == jax.__version__


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("litter")
def test_resumed_run_equals_the_uninterrupted_one(finished, run, monkeypatch, capfd):
    """Bit for bit: state, logged metrics and scores. A damaged checkpoint is set aside
    for the one before, whose scores are made up for first."""
    config, workdir = finished
    score, seen = Observer._score, []

    def counted(self, step, params):
        seen.append(step)
        return score(self, step, params)

    monkeypatch.setattr(Observer, "_score", counted)
    _, resumed = run
    train(config, str(resumed))
    assert seen == [2, 4]
    states = final_state(config, workdir), final_state(config, resumed)
    jax.tree.map(np.testing.assert_array_equal, *states)
    for key in ("loss", "eval/frechet"):
        ours, whole = (
            without_speed(r for r in rows(folder) if key in r)
            for folder in (resumed, workdir)
        )
        assert ours == whole
    assert [r["step"] for r in whole] == [2, 4]
    heard = capfd.readouterr().err
    assert f"{resumed / 'checkpoints' / '4'} is damaged (" in heard
    assert "set aside as damaged-4" in heard
    reason = (resumed / "checkpoints" / "damaged-4" / "reason.txt").read_text()
    assert reason.strip() in heard
    told, event, *_ = rows(resumed, "events")
    assert told["line"] in heard
    assert (event["event"], event["step"], event["instead_of"]) == ("restored", 2, 4)


def tiny_inception(*_):
    """Something that gives what Inception gives, in no time."""

    def features(images):
        x = images.reshape(len(images), -1) / 255.0
        p = np.exp(x[:, :5])
        p /= p.sum(axis=1, keepdims=True)
        return {"pool": x[:, :8], "spatial": x[:, 8:12], "probabilities": p}

    vars(features).update(kind="inception", distance="fid", facts={"inception": "w"})
    return features


def test_fid_while_training(finished, tmp_path, monkeypatch):
    """As on ImageNet: against a reference file; decoded records stand for the real
    images; the distances follow from the moments of the samples, which are those of
    `sample`."""
    config, _ = finished
    mu, sigma = np.full(8, 2.0), np.eye(8)
    reference = tmp_path / "reference.npz"
    real, _ = load_digits("test")
    stored = {"mu": mu, "sigma": sigma, "mu_s": mu[:4], "sigma_s": sigma[:4, :4]}
    np.savez(reference, arr_0=real[:20], **stored)
    config = config.override(
        {
            "eval.features": "inception", "eval.reference": str(reference), "steps": 2,
            "eval.every": 1, "eval.num_samples": 24, "sampling.labels": "random",
            "run.checkpoint_every": 1, "run.keep_checkpoints": 1,
            "run.sample_every": 1, "run.profile_steps": "2:2",
        }
    )  # fmt: skip
    monkeypatch.setattr("sra2_jax.observe.make_features", tiny_inception)
    workdir = tmp_path / "run"
    train(config, str(workdir))
    scored = [r for r in rows(workdir) if "eval/fid" in r]
    assert [r["step"] for r in scored] == [1, 2]
    results = json.loads((workdir / "results.json").read_text())
    assert results["metrics"] == {
        k.removeprefix("eval/"): v for k, v in scored[1].items() if k != "step"
    }
    assert "FID" in (workdir / "report.html").read_text()
    assert next((workdir / "profile").rglob("*.xplane.pb")).stat().st_size > 1000
    names = {p.name for p in workdir.rglob("*.png")}
    assert names == {"reconstruction.png", "step_00000001.png", "step_00000002.png"}
    kept = {p.name for p in (workdir / "checkpoints").glob("[0-9]*")}
    best = min(scored, key=lambda r: r["eval/fid"])["step"]
    assert kept == {"2", str(best)}  # the newest and the best
    out = tmp_path / "samples.npz"
    command = ["sample", str(workdir), f"--out={out}", "--num=24"]
    monkeypatch.setattr("sys.argv", command)
    sample.main()
    with np.load(out) as file:
        x = file["arr_0"].reshape(24, -1)[:, :12] / 255.0
    for name, part in (("fid", x[:, :8]), ("sfid", x[:, 8:])):
        shift = np.sum((part.mean(axis=0) - 2) ** 2)
        values = np.linalg.eigvalsh(np.cov(part, rowvar=False))
        expected = shift + np.sum((np.sqrt(np.maximum(values, 0)) - 1) ** 2)
        assert results["metrics"][name] == pytest.approx(expected, rel=1e-6)
    held = real[:20].reshape(20, -1)[:, :8] / 255.0
    expected = kernel_distance(held, x[:, :8])
    assert results["metrics"]["kernel_distance"] == pytest.approx(expected, rel=1e-6)

    # Goes on with other judges.
    monkeypatch.undo()
    np.savez(tmp_path / "images.npz", arr_0=real[:20])
    more = {"eval.features": "dinov2", "eval.dinov2": "digits", "steps": 3}
    more |= {"eval.reference": f"{tmp_path}/images.npz", "run.profile_steps": ""}
    train(config.override(more), str(workdir))
    scores = rows(workdir)[-1]
    assert scores.keys() == {"step", "eval/fd_dinov2", "eval/kernel_distance"}
    assert scores["eval/fd_dinov2"] > 0
    assert "FD-DINOv2" in (workdir / "report.html").read_text()


def test_samples_that_cannot_be_scored_stop_nothing(tiny):
    heard, observer = [], Observer.__new__(Observer)
    vars(observer).update(
        config=Config.of(tiny),
        features=make_features("digits", "", None, 0),
        reference="not reached",
        generate=lambda *_: iter([np.zeros((80, 32, 32, 3), np.uint8)]),
        log=types.SimpleNamespace(message=heard.append),
        _between=lambda batches: batches,
    )
    assert observer._score(2, None) == {}
    assert "step 2: not scored: samples: 80 images, all with the same" in heard[0]


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_a_lost_config_and_a_foreign_checkpoint(
    finished, tmp_path, capsys
):
    """Are left alone. A checkpoint is also held against the model itself, array by
    array."""
    config, workdir = finished
    workdir = shutil.copytree(workdir, tmp_path / "run")
    before = snapshot(workdir)
    train(config, str(workdir))
    assert "finished at step 4 already" in capsys.readouterr().out
    changed = {p.name for p, b in snapshot(workdir).items() if before.get(p) != b}
    assert changed <= {"versions.json"}
    (workdir / "results.json").unlink()
    before = snapshot(workdir / "checkpoints")
    with one_line("is at step 4, beyond config.steps=3"):
        train(config.override({"steps": 3}), str(workdir))
    (workdir / "config.json").unlink()
    with one_line("config.json cannot be read"):
        train(config, str(workdir))
    config = config.override({"model.width": 32})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with one_line("is of another model: ema/heads/vae/linear_0"):
        train(config, str(workdir))
    assert snapshot(workdir / "checkpoints") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.dir": "/nowhere", "data.images": ""}, "no latents dataset in /nowhere"),
        ({"latents.size": 8}, "config says latents.size=8, dataset was encoded with 4"),
        ({"vae": "/nowhere"}, "/nowhere"),
    ],
)
def test_refusals(finished, tmp_path, changes, message):
    with one_line(message):
        train(finished[0].override(changes), str(tmp_path / "run"))


def test_compiled_programs_are_kept_on_accelerators(tmp_path, monkeypatch):
    """Unless the user has named a place, as these tests do."""
    place = jax.config.jax_compilation_cache_dir
    try:
        for backend, before, after in (
            ("gpu", place, place),
            ("gpu", None, str(tmp_path)),
            ("cpu", None, None),
        ):
            monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
            jax.config.update("jax_compilation_cache_dir", before)
            keep_compiled(tmp_path)
            assert jax.config.jax_compilation_cache_dir == after
    finally:
        jax.config.update("jax_compilation_cache_dir", place)
