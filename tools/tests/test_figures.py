"""Figures: their mathematics against scikit-learn, the programs on a tiny run."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from sra2_jax.data.encode import EncodeOptions, encode
from tests.conftest import one_line
from tools import figures, plots, probes


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Workdirs of a tiny run and of a copy that passes for another seed of it."""
    _, workdir = finished
    copy = shutil.copytree(workdir, tmp_path_factory.mktemp("figures") / "b")
    return workdir, changed(copy, seed=1)


def changed(workdir, **keys):
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | keys))
    return workdir


@pytest.fixture
def draw(monkeypatch):
    """Run the program; returns the matplotlib Figure that it saves."""
    drawn = []
    save = figures.save

    def keep(figure, out):
        drawn.append(figure)
        save(figure, out)

    def call(*arguments):
        monkeypatch.setattr(figures, "save", keep)
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
        figures.main()
        return drawn[-1]

    return call


def width(path):
    with Image.open(path) as image:
        image.load()
        return image.width


def r2(x, y, test):
    train, tested = (probes.gram(x[rows], y[rows]) for rows in (~test, test))
    return probes.ridge_r2(train, tested, x.shape[1])


@pytest.mark.parametrize("penalty", [1e-6, 0.3])
def test_ridge_equals_scikit_learn(monkeypatch, penalty):
    monkeypatch.setattr(probes, "PENALTY", penalty)
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 7)) * random.uniform(0.1, 5, 7) + 40
    y = x @ random.normal(size=(7, 3)) + random.normal(size=(300, 3)) - 3
    test = np.arange(300) % 4 == 3
    centred = x[~test] - x[~test].mean(axis=0)
    ridge = Ridge(alpha=penalty * np.sum(centred**2) / 7).fit(x[~test], y[~test])
    predicted = ridge.predict(x[test])
    expected = 1 - np.sum((y[test] - predicted) ** 2) / np.sum(
        (y[test] - y[test].mean(axis=0)) ** 2
    )
    assert r2(x, y, test) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(
        r2_score(y[test], predicted, multioutput="variance_weighted")
    )
    halves = probes.gram(x[:99], y[:99]) + probes.gram(x[99:], y[99:])
    np.testing.assert_allclose(halves, probes.gram(x, y), rtol=1e-12)


def test_colors_are_the_principal_components():
    random = np.random.default_rng(2)
    tokens = random.gamma(1.0, size=(5, 9, 6)) * [9, 5, 3, 1, 1, 1]
    [colors] = probes.principal_colors([tokens])
    scores = PCA(3).fit_transform(tokens.reshape(45, 6))
    scores *= np.sign(np.sum(scores**3, axis=0))
    low, high = np.percentile(scores, (2, 98), axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1).reshape(5, 9, 3)
    np.testing.assert_allclose(colors, expected, atol=1e-9)
    # neither the axes that the network happens to use nor a panel's scale matter
    turn, _ = np.linalg.qr(random.normal(size=(6, 6)))
    turned = probes.principal_colors([tokens @ turn + 4, 100 * (tokens @ turn)])
    twice = probes.principal_colors([tokens, tokens])
    np.testing.assert_allclose(turned, twice, atol=1e-9)
    [one] = probes.principal_colors([tokens[..., :1]])
    assert set(one[..., 1:].flat) == {0.5}
    assert one[..., 0].max() == 1


def test_default_blocks():
    assert probes.default_blocks(28, set()) == [19, 28]
    assert probes.default_blocks(28, {8}) == [8, 19, 28]
    assert probes.default_blocks(1, {1}) == [1]


def test_pca(runs, draw, tmp_path):
    out = tmp_path / "pca.png"
    named = f"SRA 2={runs[0]}"
    figure = draw(
        "pca", named, runs[1], "--times=0.2,0.8", "--images=3", f"--out={out}"
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == 2 * ["image", "latent", *(2 * ["t = 0.2", "t = 0.8"])]
    texts = [text.get_text() for text in figure.texts]
    assert texts == [
        "SRA 2, step 4", "block 1 (aligned)", "block 2",
        "tiny, step 4", "block 1 (aligned)", "block 2",
    ]  # fmt: skip
    same = [axis.images[0].get_array() for axis in figure.axes]
    for left, right in zip(same[:6], same[6:], strict=True):  # the copy's weights
        np.testing.assert_array_equal(left, right)
    assert width(out) > 800


def test_probe(runs, draw, tmp_path):
    """At t = 0 the input is the latent itself, at t = 1 it knows nothing of it."""
    figure = draw("probe", *runs, "--times=0,0.5,1", "--records=64",
                  f"--out={tmp_path}/probe.png")  # fmt: skip
    assert [axis.get_title() for axis in figure.axes] == ["t = 0", "t = 0.5", "t = 1"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["tiny (mean of 2 runs)", "aligned block"]
    facts = json.loads((tmp_path / "probe.json").read_text())
    assert facts["records"] == 64
    assert [run["workdir"] for run in facts["runs"]] == [str(run) for run in runs]
    table, copy = (np.array(run["r2"]) for run in facts["runs"])
    np.testing.assert_allclose(table, copy, atol=1e-6)
    assert table.shape == (3, 3)
    assert table[0, 0] == pytest.approx(1, abs=1e-6)
    assert 0.4 < table[1, 0] < 0.8
    assert table[2, 0] == pytest.approx(0, abs=0.05)
    assert (table[0] > 0.9).all()
    mean = figure.axes[1].lines[2]
    np.testing.assert_allclose(mean.get_ydata(), table[1], atol=1e-6)
    draw("probe", runs[0], "--times=0.5", "--records=64", "--no_label",
         f"--out={tmp_path}/without.png")  # fmt: skip
    without = json.loads((tmp_path / "without.json").read_text())["runs"][0]["r2"][0]
    assert without[0] == pytest.approx(table[1, 0], abs=1e-9)
    assert all(without[1:] != table[1, 1:])


def test_training_seconds():
    series = {"images_per_second": (np.array([10, 20, 25]), np.array([8.0, 16.0, 2.0]))}
    steps, seconds = figures.training_seconds(series, 4)
    np.testing.assert_array_equal(steps, [0, 10, 20, 25])
    np.testing.assert_allclose(seconds, [0, 5, 7.5, 17.5])


def test_curves(runs, draw, tmp_path):
    """Two seeds and another run: thin lines, their mean over common steps."""
    folders = [shutil.copytree(runs[0], tmp_path / name) for name in "abc"]
    changed(folders[1], seed=1)
    changed(folders[2], name="other")
    for folder, factor in zip(folders, (1, 3, 5), strict=True):
        rows = [{"step": s, "images_per_second": 16 * factor} for s in (1, 2, 3, 4)]
        rows += [{"step": s, "eval/frechet": factor / s} for s in (2, 4)]
        rows += [{"step": 3, "eval/frechet": 9.0}] if factor == 3 else []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
    figure = draw("curves", *folders, f"--out={tmp_path}/curves.png")
    [axis] = figure.axes
    thin, other_thin, mean, other, *levels = axis.lines
    np.testing.assert_allclose(thin.get_xydata(), [[2, 0.5], [4, 0.25]])
    np.testing.assert_allclose(other_thin.get_xydata(), [[2, 1.5], [3, 9], [4, 0.75]])
    np.testing.assert_allclose(mean.get_xydata(), [[2, 1], [4, 0.5]])
    np.testing.assert_allclose(other.get_xydata(), [[2, 2.5], [4, 1.25]])
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[:2] == ["tiny (mean of 2 runs)", "other"]
    assert [label.split(":")[0] for label in labels[2:]] == [
        "real images", "real images through the VAE",
    ]  # fmt: skip
    reference = json.loads((folders[0] / "results.json").read_text())["reference"]
    assert levels[0].get_ydata()[0] == reference["real_frechet"]
    assert axis.get_yscale() == "log"
    figure = draw("curves", *folders, "--against=seconds", f"--out={tmp_path}/s.png")
    x = [line.get_xdata().tolist() for line in figure.axes[0].lines[:4]]
    expected = [[2, 4], [2 / 3, 1, 4 / 3], [4 / 3, 8 / 3], [2 / 5, 4 / 5]]
    for found, wanted in zip(x, expected, strict=True):
        np.testing.assert_allclose(found, wanted)
    assert "nothing else counted" in figure.axes[0].get_xlabel()
    assert width(tmp_path / "s.png") > 800


def test_many_labels_look_different():
    lines = [plots.Line(str(i), *(3 * [np.arange(2.0)])) for i in range(9)]
    with plots.style():
        figure = plots.curves_figure(lines, {}, "", "")
    looks = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
    assert len(looks) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pca nowhere", "nowhere/config.json cannot be read"),
        ("pca A --blocks=1,3", "--blocks=3: the shallowest run has 2 blocks"),
        ("pca A --blocks=two", "--blocks: two: give numbers between 1 and 1000"),
        ("probe A --times=0.5,1.5", "--times: 0.5,1.5: give numbers between 0 and 1"),
        ("probe A --record=3", "unknown flag --record: did you mean --records"),
        ("probe A --records=9999", "has 1437 records, 9999 are asked for"),
        ("probe A --records=3", "3 records are too few for the 16 channels of A"),
        ("probe A --data=nowhere", "nowhere: no latents.json in this folder"),
        ("pca A OTHER", "the datasets of A and OTHER hold different records"),
        ("curves A --metric=fid", "A: no metric 'fid'; logged: eval/accuracy, eval/fr"),
        ("pca A --out=A/new/x.png", "x.png is no file in a folder that exists"),
    ],
)  # fmt: skip
def test_refusals(runs, draw, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A").symlink_to(runs[0])
    if "OTHER" in arguments:
        ignore = shutil.ignore_patterns("checkpoints")
        shutil.copytree(runs[1], tmp_path / "OTHER", ignore=ignore)
        names = {"images": "digits", "vae": "digits", "split": "test"}
        encode(EncodeOptions(str(tmp_path / "held_out"), resolution=32, **names))
        section = json.loads((tmp_path / "OTHER" / "config.json").read_text())["data"]
        changed(tmp_path / "OTHER", data=section | {"dir": "held_out"})
    words = arguments.split()
    if "--out" not in arguments:
        words.append("--out=out.png")
    with one_line(message):
        draw(*words)
    assert not (tmp_path / "out.png").exists()
