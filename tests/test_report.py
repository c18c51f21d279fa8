"""The report: self-contained, complete, and written whatever a run lacks."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sra2_jax.report.curves import curve, limits, short, smooth
from sra2_jax.report.page import STRIP, write_report

HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/a>&amp;"
VOID = {"meta", "img", "input", "br"}
CONFIG = {
    "name": "tiny",
    "seed": 3,
    "steps": 40,
    "batch_size": 8,
    "data": {"images": "digits", "resolution": 32},
    "model": {"width": 16, "depth": 2},
    "align": {"vae": {"enabled": True, "depth": 1}},
    "eval": {"features": "digits", "num_samples": 20},
}
RESULTS = {
    "step": 40,
    "num_samples": 20,
    "metrics": {"frechet": 1.29, "accuracy": 0.936},
    "reference": {"real_frechet": 0.21, "reconstruction_accuracy": 0.978},
    "features": "a space",
    "note": "a note",
}
METHOD = {"name": "vae", "title": "SRA 2", "aim": "the same latents", "depth": 1}


class Page(HTMLParser):
    """Fails on tags that do not nest; keeps tags, and text outside script and style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source, self.text = path.read_text(encoding="utf-8"), ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def young(tmp_path: Path) -> Path:
    """A run that has only begun."""
    write_json(tmp_path / "config.json", CONFIG)
    return tmp_path


@pytest.fixture
def run(young: Path) -> Path:
    """A whole run."""
    write_json(young / "versions.json", {"jax": "0.10.2", "commit": "abc", "date": "D"})
    facts = {"parameters": {"network": 1_034_512, "heads": 9000}}
    facts |= {"compile_seconds": 8.4, "methods": [METHOD]}
    write_json(young / "run.json", facts)
    write_json(young / "results.json", RESULTS)
    keys = ("loss_denoise", "loss_align_vae", "ratio_align_vae", "grad_norm")
    keys += ("learning_rate", "images_per_second")
    rows = [{"step": s} | {k: 1 + 1 / s for k in keys} for s in range(1, 41)]
    rows += [{"step": s, "eval/frechet": 9 / s, "eval/accuracy": 0.9} for s in (20, 40)]
    (young / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for k, name in enumerate(
        ("real", "reconstruction", "step_00000020", "step_00000040")
    ):
        folder = young / ("samples" if "step" in name else "images")
        folder.mkdir(exist_ok=True)
        pixels = np.full((20, 20), 40 * k, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return young


def test_is_whole_and_self_contained(run):
    page = Page(write_report(run))
    assert not re.search(r"https?://|url\s*\((?!#)|@import", page.source)
    assert not re.search(r"(?<=:) ?#[0-9a-f]{6}", page.source.partition("<main>")[2])
    fetched = [a[k] for _, a in page.tags for k in ("src", "href") if k in a]
    assert all(source.startswith("data:image/png;base64,") for source in fetched)
    assert not page.every("link")
    assert not any("src" in attrs for attrs in page.every("script"))
    sources = [attrs["src"] for attrs in page.every("img") if "src" in attrs]
    assert (len(sources), len(set(sources))) == (5, 4)  # the last samples twice
    assert len(page.every("svg")) == 8
    assert "missing" not in {attrs.get("class") for attrs in page.every("p")}
    words = ["0.936", "0.978", "1.29", "0.21", "1.03M", "8.4"]
    words += ["a space", "a note", "SRA 2 run", "block 1 aligned with the same latents"]
    for word in (*words, "git checkout abc", "--config=tiny --config.seed=3"):
        assert word in page.text
    [progress] = [a for a in page.every("div") if a.get("class") == "progress"]
    assert "hidden" in progress
    assert not list(run.glob("*.tmp"))
    assert Page(write_report(run)).source == page.source


def test_names_what_a_young_run_lacks(young):
    page = Page(write_report(young))
    assert page.text.count("Not logged yet.") == 8
    for words in ("No pictures yet", "No samples yet", "No metrics", "Not noted yet"):
        assert words in page.text
    assert "step 0 of 40" in page.text
    assert "vae run" in page.text  # without run.json the section's name


def test_a_run_without_proxy_or_alignment(run):
    plain = CONFIG | {"eval": {"features": ""}, "align": {"vae": {"enabled": False}}}
    write_json(run / "config.json", plain)
    for name in ("run.json", "results.json", "images/real.png"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss_denoise": 0.5}\n')
    page = Page(write_report(run))
    assert "vanilla run" in page.text
    assert "No metrics" in page.text
    assert "Alignment loss" not in page.text
    assert "nothing aligned" in page.text


def test_survives_garbled_files(run):
    lines = [
        '{"step": 5, "loss_denoise": 7}',
        '{"step": 5, "loss_denoise": 8}',
        '{"step": 6, "loss_denoise": NaN, "grad_norm": Infinity}',
        '{"step": 7, "grad_norm": "high", "learning_rate": null}',
        '{"step": 1' + "0" * 400 + ', "grad_norm": 1}',
        '{"loss_denoise": 1}',
        "[1, 2]",
        '{"step": 9, "lo',
    ]
    (run / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n\n")
    for name in ("versions", "run", "results"):
        (run / f"{name}.json").write_text('{"a": ')
    png = run / "images" / "real.png"
    png.write_bytes(png.read_bytes()[:40])
    page = Page(write_report(run))
    assert "Denoising loss8" in page.text  # of a step written twice, the later
    assert page.text.count("Not logged yet.") == 7
    assert "images held out" not in page.text


def test_escapes_hostile_text(run):
    nested = {"vae": {"enabled": True, HOSTILE: HOSTILE, "depth": HOSTILE}}
    hostile = {"name": HOSTILE, "seed": HOSTILE, HOSTILE: HOSTILE, "align": nested}
    write_json(run / "config.json", CONFIG | hostile | {"data": {"images": HOSTILE}})
    everything = dict.fromkeys((HOSTILE, "device", "date", "commit"), HOSTILE)
    write_json(run / "versions.json", everything)
    write_json(run / "run.json", {"methods": [dict.fromkeys(METHOD, HOSTILE)]})
    bad = dict.fromkeys((HOSTILE, "features", "step", "note"), HOSTILE)
    write_json(run / "results.json", bad | {"metrics": {HOSTILE: 1.0}})
    page = Page(write_report(run))
    assert len(page.every("script")) == 1
    assert not any("evil" in (attrs.get("src") or "") for _, attrs in page.tags)
    assert page.text.count(HOSTILE) > 10


def test_many_and_large_pictures_are_reduced(run):
    for step in range(50):
        pixels = np.zeros((4, 1600), np.uint8)
        Image.fromarray(pixels).save(run / f"samples/step_{step:08d}.png")
    page = Page(write_report(run))
    assert f"{STRIP} of the 50 saved grids" in page.text
    widths = [int(a["width"]) for a in page.every("img") if "width" in a]
    assert len(widths) == 3 + STRIP
    assert max(widths) == 1280


def test_program(run):
    """Without what is slow to import; mistakes in one line."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['jax', 'flax', 'tensorflow']))\n"
        "from sra2_jax.__main__ import console; console()"
    )

    def program(*arguments):
        command = [sys.executable, "-c", code, "report", *map(str, arguments)]
        root = Path(__file__).parents[1]
        return subprocess.run(command, capture_output=True, text=True, cwd=root)

    done = program(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {run / 'report.html'}\n"
    done = program(run / "images")
    assert done.returncode == 2
    assert re.fullmatch(r"error: no run: .*config\.json is missing.*\n", done.stderr)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (0.4123, "0.412"), (1e-4, "0.0001"), (1234.4, "1.23k"),
     (9999.6, "10k"), (56_700, "56.7k"), (999_900, "1M"), (675e6, "675M"),
     (-0.5, "-0.5")],
)  # fmt: skip
def test_short(value, words):
    assert short(value) == words


def test_smooth():
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3.0)
    values = np.zeros(600)
    values[300] = 441.0  # spread over 2 x 10 on each side, the peak at 1 / 21
    mean = smooth(values)
    assert (mean > 0.5).nonzero()[0].tolist() == [*range(280, 321)]
    assert mean.argmax() == 300
    assert mean.max() == pytest.approx(21)
    np.testing.assert_array_equal(smooth(values[280:320]), values[280:320])


@pytest.mark.parametrize(
    "values", [[1e-4], [0.0], [-3.0], [1234.0, 1234.4], [0.0, 1e12], [1e-12, -1e9]]
)
def test_any_values_are_drawn(values):
    """Within the frame, with labels that differ."""
    series = np.arange(len(values), dtype=float), np.array(values)
    low, high = limits(series[1], [])
    assert low <= min(values) <= max(values) < high
    drawn = curve("title", series, len(values) - 1)
    labels = re.findall(r"text-anchor: end.*?>(.*?)</text>", drawn)
    assert len(set(labels)) == len(labels) > 1
