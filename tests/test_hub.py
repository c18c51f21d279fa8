"""A run's network to a hub and back, by the hub's own client."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

import sra2_jax as sra
from sra2_jax.programs import pull, push
from sra2_jax.programs.push import write_card
from sra2_jax.run import Run
from sra2_jax.weights.files import ASSETS
from tests.conftest import one_line
from tests.hub import TOKEN, hub

LABELS = [3, 1, 4]


@pytest.fixture
def own(finished, tmp_path):
    """The finished run with a VAE of its own."""
    workdir = Path(shutil.copytree(finished[1], tmp_path / "home" / "tiny"))
    vae = shutil.copytree(ASSETS / "digits_vae", tmp_path / "home" / "vae")
    config = json.loads((workdir / "config.json").read_text()) | {"vae": str(vae)}
    (workdir / "config.json").write_text(json.dumps(config))
    return str(workdir)


def call(monkeypatch, program, *arguments):
    monkeypatch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
    program.main()


def images(run):
    return sra.generate(run.program, run.params, LABELS)


@pytest.mark.filterwarnings("ignore:Use 'content")  # httpx's, of the client's way
def test_there_and_back(own, tmp_path, monkeypatch, capfd):
    run = sra.load_run(own, guidance=1.5)
    expected = images(run)
    with hub(monkeypatch, tmp_path / "cache") as server:
        server.full = True
        flags = own, "--to=owner/tiny", "--licence=CC BY 4.0"
        with one_line("owner/tiny: not sent to the hub", "run again"):
            call(monkeypatch, push, *flags)
        call(monkeypatch, push, *flags)
        # The three large files were there after the first attempt.
        files = server.repos["owner/tiny"]
        assert len(server.heard) == len(server.large) == 3
        card = files["README.md"].decode()
        for words in ("SRA 2. A SiT of", "4 of 4\nsteps", "| frechet | ", "CC BY 4.0"):
            assert words in card
        assert str(tmp_path) not in card + files["config.json"].decode()

        server.cut = True  # the client asks for the rest
        found = sra.load_run("hub:owner/tiny@main", guidance=1.5)
        assert not server.cut
        np.testing.assert_array_equal(images(found), expected)
        assert found.settings["run"] == "hub:owner/tiny@main"
        call(monkeypatch, pull, "owner/tiny", f"--workdir={tmp_path / 'again'}")
        with one_line("owner/other: not from the hub"):
            sra.load_run("hub:owner/other")
        with one_line("holds checkpoints already"):
            pull.pull("owner/tiny", own)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with one_line("not sent to the hub", "token"):
            call(monkeypatch, push, *flags)
    shutil.rmtree(tmp_path / "home")
    again = sra.load_run(str(tmp_path / "again"), guidance=1.5)
    np.testing.assert_array_equal(images(again), expected)
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err


def test_offline_is_one_line(finished, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with one_line("not sent to the hub", "HF_HUB_OFFLINE"):
        push.push(str(finished[1]), "owner/tiny")
    with one_line("not from the hub", "HF_HUB_OFFLINE"):
        sra.load_run("hub:owner/tiny")


def test_card_of_a_young_run(tmp_path, finished):
    """No results, no samples: it says so."""
    run = Run(epath.Path(tmp_path))
    run.write("config", finished[0].to_dict())
    card = write_card(run, finished[0], "owner/young", "ema", "not stated")
    assert "None were measured." in card
    assert "samples.png" not in card
