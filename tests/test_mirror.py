"""A run mirrored to W&B, whose place a stand-in takes: it notes what it is given."""

import importlib.machinery
import json
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sra2_jax.programs import mirror
from sra2_jax.run import Lock, Run
from tests.conftest import one_line


@pytest.fixture
def wandb(monkeypatch):
    """Its `init`, `log` and `Image`; a run goes on after its last step."""
    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.logged, module.Image = {}, lambda image: image.size

    def init(*, id, **named):
        rows = module.logged.setdefault(id, [])
        module.named = named

        def log(row, step):
            assert step > (rows[-1][0] if rows else -1)  # W&B drops it otherwise
            rows.append((step, row))

        step = rows[-1][0] + 1 if rows else 0
        return SimpleNamespace(step=step, log=log, finish=lambda: None)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def log(run, *rows):
    with open(run.metrics, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_mirrors_to_the_end_and_goes_on(tmp_path, wandb, monkeypatch, capsys):
    run = Run(tmp_path / "xl")
    run.samples(20).parent.mkdir(parents=True)
    run.write("config", {"name": "x", "seed": 3})
    monkeypatch.setattr(mirror, "PAUSE", 0.02)
    with Lock(run):
        log(run, {"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0})
        thread = threading.Thread(target=mirror.mirror, args=(str(run), "p"))
        thread.start()
        while not any(wandb.logged.values()):
            time.sleep(0.02)
        time.sleep(0.1)
        (rows,) = wandb.logged.values()
        assert rows == [(10, {"loss": 2.0})]  # of step 20 more may come
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(run.samples(20))
        log(run, {"step": 20, "eval/fid": 9.0}, {"step": 30, "loss": 0.5})
    thread.join(10)
    second = (20, {"loss": 1.0, "eval/fid": 9.0, "samples": (6, 4)})
    assert rows == [(10, {"loss": 2.0}), second, (30, {"loss": 0.5})]
    assert (wandb.named["name"], wandb.named["project"]) == ("xl", "p")
    assert wandb.named["config"] == {"name": "x", "seed": 3}
    # a resumed run logs a step again
    log(run, {"step": 30, "loss": 0.5}, {"step": 40, "loss": 0.4})
    monkeypatch.setattr(sys, "argv", ["mirror", str(run), "--to=wandb"])
    mirror.main()
    assert rows[3:] == [(40, {"loss": 0.4})]
    assert "sent up to step 40" in capsys.readouterr().out


def test_refuses_before_it_sends(tmp_path, monkeypatch):
    with one_line("no run is there"):
        mirror.mirror(str(tmp_path), "p")
    Run(tmp_path).write("config", {"name": "x"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with one_line("pip install -e '.[wandb]'"):
        mirror.mirror(str(tmp_path), "p")
