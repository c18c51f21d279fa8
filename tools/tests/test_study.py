"""The study of methods: its images, its networks, its runner, on small made-up data."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image, ImageDraw

from benchmarks.study import __main__ as study
from benchmarks.study import data, report
from sra2_jax.data.digits import load_digits
from sra2_jax.metrics.moments import frechet_distance, gaussian
from sra2_jax.weights import load_dinov2, load_vae
from sra2_jax.weights.dinov2 import FORMAT
from tests.conftest import one_line
from tools import minimise, train_encoder, train_vae


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def program(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    main()


@pytest.fixture
def digits(tmp_path):
    """Folders of pictures, a few of each digit."""
    for split in ("train", "test"):
        images, labels = load_digits(split)
        for i in range(60):
            folder = tmp_path / "data" / split / str(labels[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_drawings(tmp_path, monkeypatch):
    """Cut out and centred; no copies, nothing grey or tiny; an eighth held out."""
    root = tmp_path / "packages"
    monkeypatch.setattr(data, "unpacked", lambda package, *_: root / package)
    for package, *_ in (data.CLIPS, data.STAMPS):
        (root / package / "usr/share/doc" / package).mkdir(parents=True)
        (root / package / "usr/share/doc" / package / "copyright").write_text("free")
    for number, (name, sources) in enumerate(data.DRAWINGS.items()):
        folder = root.joinpath(*sources[0])
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(8 if name == "food" else 1):
            picture = Image.new("RGBA", (300, 200))
            draw = ImageDraw.Draw(picture)
            draw.rectangle((20, 30, 60 + 25 * i, 90 + number), fill=(230, 20, 40))
            picture.save(folder / f"{i}.png")
        Image.new("RGBA", (300, 200), "grey").save(folder / "grey.png")
        picture.save(folder / "copy.png")
    program(monkeypatch, data.main, "drawings", f"--out={tmp_path / 'out'}")
    found = sorted((tmp_path / "out").rglob("*.png"))
    assert len(found) == 8 + 6 + 1  # and the contact sheet
    assert [p.parts[-3:-1] for p in found if "test" in p.parts] == [("test", "food")]
    with Image.open(next(p for p in found if "food" in p.parts)) as picture:
        pixels = np.asarray(picture)
    rows, columns = (np.flatnonzero((pixels < 250).any((2, k))) for k in (1, 0))
    assert pixels.shape == (64, 64, 3)
    assert abs(rows[0] + rows[-1] - 63) <= 1
    assert abs(columns[0] + columns[-1] - 63) <= 1
    assert max(np.ptp(rows), np.ptp(columns)) == 59
    with one_line("exists already"):
        program(monkeypatch, data.main, "drawings", f"--out={tmp_path / 'out'}")


def test_held_out_crops_lie_in_a_field_of_their_own(tmp_path, monkeypatch):
    """A photograph whose fields have a colour each: none is in both parts."""
    monkeypatch.setattr(data, "PHOTOGRAPHS", [("package", "root", "a.png")])
    folder = tmp_path / "package" / "root"
    folder.mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 30, (400, 800, 3), np.uint8)
    fields = np.arange(8).reshape(2, 4).repeat(200, 0).repeat(200, 1)
    Image.fromarray(picture + 25 * fields[..., None].astype(np.uint8)).save(
        folder / "a.png"
    )
    licence = tmp_path / "package/usr/share/doc/package/copyright"
    licence.parent.mkdir(parents=True)
    licence.write_text("free")
    carried = tmp_path / "carried"
    words = f"--out={carried}", f"--packages={tmp_path}"
    program(monkeypatch, data.main, "photographs", *words)
    assert (carried / "package" / licence.relative_to(tmp_path / "package")).exists()
    crops = list(data.textures({"package": carried / "package"}, 32, 80))
    assert len(crops) == 80
    seen = {True: set(), False: set()}
    for _, held_out, crop in crops:
        assert crop.size == (32, 32)
        seen[held_out].add(round((np.asarray(crop).mean() - 14.5) / 25))
    assert len(seen[True]) == 1
    assert not seen[True] & seen[False]
    assert sum(held_out for _, held_out, _ in crops) == 10


def test_a_training_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    def loss(params, key):
        return jnp.square(params["x"] - 3).sum()

    def run(kept):
        start = {"x": jnp.arange(4.0)}
        return minimise.minimise(loss, start, optax.adam, 0.1, 20, kept)["x"]

    clock = iter(range(0, 10**6, 61))  # every step is written
    monkeypatch.setattr(minimise.time, "monotonic", lambda: next(clock))
    whole, real, left = run(None), minimise.whole_file, [7]

    def failing(path):
        left[0] -= 1
        if not left[0]:
            raise OSError("No space left")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(minimise, "whole_file", failing)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "state")
    np.testing.assert_array_equal(run(tmp_path / "state"), whole)
    (tmp_path / "state").write_bytes(b"another")
    with one_line("cannot be gone on from"):
        run(tmp_path / "state")


def test_networks_of_a_folder_of_images(digits, tmp_path, monkeypatch):
    """Both learn something in a few steps, and load as any other."""
    folders = digits / "train", f"--held_out={digits / 'test'}", "--resolution=16"
    steps = "--steps=20", "--batch_size=8", "--learning_rate=5e-3"
    vae = tmp_path / "vae"
    program(
        monkeypatch, train_vae.main, *folders, *steps, f"--out={vae}", "--widths=8,16"
    )
    network, params = load_vae(str(vae))
    assert network.config.downsample == 2
    pixels, _ = train_vae.read_images(str(digits / "test"), "test", 16)
    figures, rebuilt = train_vae.measure(vae, pixels)
    black = train_vae.psnr(pixels, 0 * pixels)
    assert train_vae.psnr(pixels, rebuilt) > black + 1
    assert figures["images"] == "60"
    mean, std = train_vae.encoded(network, params, pixels)
    own = np.sqrt(mean.var() + np.square(std).mean()) * network.config.scaling_factor
    assert own == pytest.approx(1, abs=0.1)
    assert size_of(vae / "reconstructions.png")[0] > 200
    with one_line("is trained already"):
        program(monkeypatch, train_vae.main, *folders, f"--out={vae}")
    encoder = tmp_path / "encoder"
    small = "--width=32", "--depth=1", f"--out={encoder}"
    program(monkeypatch, train_encoder.main, *folders, *steps, *small)
    assert load_dinov2(str(encoder))[0].config.hidden_size == 32
    assert "trained: 1 nearest neighbour" in (encoder / "README.md").read_text()


PLAN = """
config = "{config}"
keys = {{"data.dir": "{latents}", "sampling.steps": 2, "sampling.batch_size": 8,
    "model.depth": 1, "run.grid_classes": 1, {depths}}}
methods = {{"SiT": {{"align.vae.enabled": False}}, "SRA 2": {{"head": "convolution"}}}}
samplings = {{"SRA 2": {{"head": {{"sampling.head_guidance": 1.5}}}}}}
baseline, stages, seeds, samples = "SiT", (1,), 1, 16
"""


def test_a_study_stops_and_goes_on(
    digits, latents, tiny, as_file, tmp_path, monkeypatch, capsys
):
    """Then the table, and curves, of all."""
    encoder, params = load_dinov2("digits")
    FORMAT.save(digits / "judge", encoder.config, params)
    plan = tmp_path / "plan.py"
    depths = "'align.teacher.teacher_depth': 1"
    names = {"config": as_file(tiny), "latents": latents, "depths": depths}
    plan.write_text(PLAN.format(**names))
    out = tmp_path / "out"
    words = plan, f"--data={digits}", f"--out={out}"
    program(monkeypatch, study.main, *words, "--budget=0.001")
    assert "the same command goes on" in capsys.readouterr().out
    assert report.read(out / "scores.jsonl") == []
    program(monkeypatch, study.main, *words)
    assert "finished" in capsys.readouterr().out
    rows = report.read(out / "scores.jsonl")
    assert [row["method"] for row in rows] == ["SiT", "SRA 2", "SRA 2, head"]
    # Of the head, forward and twice back: a 3x3 convolution to the latent's numbers.
    macs = 9 * tiny.model.width * tiny.latents.size**2 * tiny.latents.channels
    extra = 3 * 2 * macs * tiny.batch_size
    assert rows[1]["flops"] - rows[0]["flops"] == pytest.approx(extra)
    assert rows[1]["fd own"] != rows[2]["fd own"]
    table = (out / "study.md").read_text()
    assert f"| SRA 2 | {rows[1]['fd own']:.4g} (" in table
    assert size_of(out / "study.png")[1] > 500
    levels = json.loads((out / "study.json").read_text())["levels"]
    assert levels["fd own, training images"] < rows[1]["fd own"]
    plan.write_text(plan.read_text().replace("16", "17"))
    with one_line("is of another plan"):
        program(monkeypatch, study.main, *words)


@pytest.mark.parametrize("path", [*study.PLANS.glob("[a-z]*.py")], ids=lambda p: p.stem)
def test_no_method_of_a_plan_is_another(path, tmp_path):
    plan = study.Plan.read(path.stem, tmp_path)
    runs = {
        method: (plan.settings(method, 0, plan.stages[-1]), keys.get("head"))
        for method, keys in plan.methods.items()
    }
    assert len(set(map(repr, runs.values()))) == len(runs)
    assert plan.baseline in runs
    assert set(plan.samplings) <= set(runs)


def test_a_method_with_a_change_is_held_against_the_baseline_with_it():
    """Two methods whose samples are the same differ by nothing."""
    draw = np.random.default_rng(0)
    real, *sets = (draw.normal(i, 1, (40, 2)) for i in range(5))
    plain, changed = sets[:2], sets[2:]
    features = {"SiT": plain, "SiT, x": changed}
    same = {"SRA 2": plain, "SRA 2, x": changed, "SRA 2, x, y": changed}
    found = report.differences(features | same, "SiT", real)
    assert {found[name] for name in same} == {(0, 0)}
    means = [
        np.mean([frechet_distance(*gaussian(real), *gaussian(x)) for x in sets])
        for sets in (plain, changed)
    ]
    low, high = found["SiT, x"]
    assert low < means[1] - means[0] < high < low + 20


def test_all_have_equal_progress():
    methods, samplings = {"a": {}, "b": {}}, {"b": {"x": {}}}
    plan = study.Plan("", {}, methods, samplings, "a", (10, 20), 2, 1)
    work = [run[:3] for run in plan.runs(range(2))]
    assert work[:4] == [(10, 0, "a"), (10, 0, "b"), (10, 1, "a"), (10, 1, "b")]
    assert work[4:8] == [(20, *rest) for _, *rest in work[:4]]
    assert work[8:] == [(20, 0, "b"), (20, 1, "b")]


@pytest.mark.parametrize("name", [path.stem for path in study.PLANS.glob("[a-z]*.py")])
def test_plans_can_run(name, tmp_path):
    """Each config is one; titles differ as folders too."""
    plan = study.Plan.read(name, tmp_path)
    assert plan.baseline in plan.methods
    for method in plan.methods:
        config = plan.settings(method, 1, plan.stages[-1])
        for keys in plan.samplings.get(method, {}).values():
            config.override(keys)
    folders = {report.features(tmp_path, m, 0, 1).parent for m in plan.methods}
    assert len(folders) == len(plan.methods)
    assert plan.samplings.keys() <= plan.methods.keys()


def test_differences_hold_what_was_put_in():
    """A shift by 1 along an axis is a distance of 1 more; none is none."""
    draw = np.random.default_rng(0)
    held = draw.normal(size=(500, 4))
    noise = draw.normal(size=(2, 400, 4))
    sets = {
        "base": list(noise),
        "same": list(noise),
        "off": list(noise + np.eye(4)[0]),
    }
    found = report.differences(sets, "base", held)
    assert found["same"] == (0, 0)
    low, high = found["off"]
    assert 0.7 < low < 1 < high < 1.4
