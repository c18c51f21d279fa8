"""Runs in the browser: what the server gives out, and what it does not."""

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from etils import epath
from PIL import Image

from sra2_jax.programs.serve import make_server
from sra2_jax.run import Run
from tests.conftest import one_line

HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of them in a folder of its own, and a link out of the folder."""
    folder = tmp_path / "runs"
    for name, steps in (("a", 700), (f"more/{HOSTILE}", 300)):
        run = Run(folder / name)
        run.samples(100).parent.mkdir(parents=True)
        run.write("config", {"name": "x", "steps": 1000, "align": {"vae": {}}})
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run.samples(100))
        rows = (
            {"step": s, "loss": 2.0, "loss_align_vae": 1 / s} for s in range(1, steps)
        )
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Run(folder / "a").report.write_text("a report")
    shutil.copytree(folder / "a", tmp_path / "out")
    (folder / "link").symlink_to(tmp_path / "out")
    return folder


@contextmanager
def served(folder):
    with make_server(epath.Path(folder), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fetch(url, **named):
    with urllib.request.urlopen(urllib.request.Request(url, **named)) as reply:
        return reply.read()


def test_gives_out_runs_and_nothing_else(runs):
    (runs / "a" / "samples" / "step_00000200.png").symlink_to("/etc/hostname")
    with served(runs) as url:
        found = json.loads(fetch(url + "runs"))
        assert sorted(found) == ["a", f"more/{HOSTILE}"]
        a = found["a"]
        assert (a["step"], a["steps"], a["running"], a["report"]) == (
            699,
            1000,
            False,
            True,
        )
        first, second = json.loads(fetch(url + "curves?run=a"))
        assert (first["title"], second["title"]) == ("Alignment loss, vae", "loss")
        assert second["steps"][::499] == [1, 699]
        assert set(second["values"]) == {2.0}
        assert fetch(url + "file?run=a") == b"a report"
        assert fetch(url + "file?run=a&step=100").startswith(b"\x89PNG")
        outside = ("curves?run=link", "file?run=../out", "file?run=a&step=200", "etc")
        for path in (
            *outside,
            "file?run=a&step=../../x",
            "file",
            "%2e%2e/out/config.json",
        ):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                fetch(url + path)
        with pytest.raises(urllib.error.HTTPError, match="501"):
            fetch(url + "runs", method="POST", data=b"x")


def test_one_run_a_used_port_and_none(runs, tmp_path):
    with served(runs / "a") as url:
        assert list(json.loads(fetch(url + "runs"))) == ["a"]
        port = int(url.split(":")[-1].strip("/"))
        with one_line("cannot be listened to", "--port"):
            make_server(epath.Path(runs), "127.0.0.1", port)
    with one_line("no run is there"):
        make_server(epath.Path(tmp_path / "none"), "127.0.0.1", 0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_in_a_browser(runs):
    """It fills the page, without a complaint, and names are text."""
    flags = ["--headless", "--no-sandbox", "--virtual-time-budget=3000"]
    with served(runs) as url:
        command = [CHROMIUM, *flags, "--enable-logging=stderr", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert "2 found, read at" in done.stdout
    assert "more/&lt;img src=x onerror=alert(1)&gt;" in done.stdout
    assert done.stdout.count("<path") == 4
    assert done.stdout.count("<img") == 2
