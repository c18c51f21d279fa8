"""What goes wrong around a run: who is told what, and what is kept."""

import queue

from sra2_jax import run, storage
from tests.test_train import rows


def test_a_lost_folder(tmp_path, monkeypatch):
    """It ends its run."""
    ends = queue.Queue()
    monkeypatch.setattr(run, "leave", lambda line, status: ends.put((line, status)))
    monkeypatch.setattr(run, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(storage, "TRIES", (0.05,))
    folder = tmp_path / "run"
    with run.Lock(run.Run(folder)):
        folder.rename(tmp_path / "moved")
        line, status = ends.get(timeout=60)
    assert line.startswith(f"error: {folder} is lost")
    assert status == 2


def test_a_stall(start, command, tmp_path):
    """The stacks of all threads, and the status that says: again."""
    words = *command, f"--workdir={tmp_path}", "--config.run.stall_seconds=2"
    stalled = start(*words, no_data=1, no_pictures=1, only_data_stalls=1)
    assert stalled.status() == 42
    assert "stopped: no progress for " in stalled.text
    assert " s (data), see the stacks above" in stalled.text
    assert 'driver.py", line' in stalled.text


def test_infinite_latents(start, command, tmp_path):
    """One batch: its update is skipped, its records are named, training goes on. More
    than are borne: the run ends and says why; what it saved is whole."""
    faults = {"no_tensorboard": 1, "no_pictures": 1}
    many = "--config.run.most_skipped=3", f"--workdir={tmp_path}"
    ended = start(*command, *many, infinite=[2, 5, 6, 7, 8], **faults)
    assert ended.status() == 2
    logged, events = rows(tmp_path), rows(tmp_path, "events")
    assert [r.get("skipped", 0) for r in logged] == [0, 1, 1, 2]
    assert ["loss" in r for r in logged] == [True, True, True, False]
    skipped = [e["step"] for e in events if e["event"] == "skipped"]
    assert skipped[:4] == [3, 6, 7, 8]
    assert "loss_denoise" in events[0]["not_finite"]
    assert len(set(events[0]["records"])) == 16
    assert "step 3: grad_norm, loss, loss_align_vae, loss_denoise" in ended.text
    assert ended.text.count("TensorBoard cannot be written (OSError: [Errno 28]") == 1
    assert "the updates of steps 6 to 9 were all skipped, more than " in ended.text
    assert (tmp_path / "checkpoints" / "8").exists()  # the state is that of step 5
