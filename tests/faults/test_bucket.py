"""A run whose folder, data and results are in a bucket: gs://, see bucket.py."""

import itertools
import json
import signal
import sys

import pytest
from etils import epath
from etils.epath import backend

from sra2_jax import storage
from tests.faults.bucket import Bucket
from tests.test_train import rows, without_speed

B = "gs://test-bucket"


@pytest.fixture
def bucket(latents):
    """A server, and the training digits in it."""
    server = Bucket()
    for path in latents.iterdir():
        server.upload("test-bucket", f"latents/{path.name}", path.read_bytes())
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def begin(start, command, bucket):
    """begin(*words, **faults): a program there; main.py where only flags are given."""

    def begin(*words, **faults):
        if words[0].startswith("--"):
            words = *command, f"--config.data.dir={B}/latents", *words
        return start(*words, **faults, environment=bucket.environment())

    return begin


def test_a_run_in_a_bucket_is_the_run_in_a_folder(begin, bucket, whole):
    """Trained, killed while it saves, gone on with in a bucket that stumbles (503 and
    429 are asked again), looked at, sampled, scored and exported."""
    remote = f"--workdir={B}/run"
    killed = begin(remote, slow_commit=0.5, slow_steps=0.2, no_pictures=1)
    eighth = "run/checkpoints/8/"
    killed.until(lambda: any(name.startswith(eighth) for name in bucket.names()))
    killed.kill(signal.SIGKILL).status()
    assert "run/checkpoints/4/commit_success.txt" in bucket.names()
    assert f"{eighth}commit_success.txt" not in bucket.names()
    second = begin(remote)
    assert second.status() == 42
    assert "was in use" in second.text

    bucket.remove("run/lock.json")  # a minute has gone by
    count, faults = itertools.count(), {9: 503, 99: 429, 200: 503}
    bucket.fault = lambda method: faults.pop(next(count), 0)
    again = begin(remote)
    assert again.status() == 0, again.text
    assert not faults
    there = map(json.loads, bucket.read("run/metrics.jsonl").splitlines())
    assert without_speed(there) == without_speed(rows(whole))
    for name in ("samples/step_00000010.png", "samples/step_00000012.png"):
        assert bucket.read(f"run/{name}") == (whole / name).read_bytes()
    assert sum("run/tensorboard/events" in name for name in bucket.names()) == 2

    sample = begin("sample", f"{B}/run", f"--out={B}/s/out.npz", "--num=80")
    status = begin("status", f"{B}/run", f"{B}/nothing")
    export = begin("convert", "export", f"{B}/run", f"--out={B}/weights.npz")
    assert status.status() == 2
    assert "step 12 of 12 (100.0%), finished" in status.text
    assert "checkpoint: step 12, 0:0" in status.text
    assert f"error: {B}/nothing" in status.text
    assert sample.status() == 0, sample.text
    assert [name for name in bucket.names() if name.startswith("s/")] == ["s/out.npz"]
    score = ["--reference=digits", "--split=test", "--features=digits"]
    evaluate = begin("evaluate", f"{B}/s/out.npz", *score)
    assert evaluate.status() == 0, evaluate.text
    assert json.loads(bucket.read("s/out.json"))["num_samples"] == 80
    assert export.status() == 0, export.text
    assert bucket.read("weights.npz").startswith(b"PK")


def test_a_bucket_that_refuses_or_vanishes(begin, bucket):
    """A 403 at the start, and a bucket that is gone, end the run with one line."""
    bucket.fault = lambda method: 403 * (method != "GET")
    run = begin(f"--workdir={B}/other")
    assert run.status() == 2
    (line,) = run.text.splitlines()
    assert f"{B}/other cannot be written" in line
    assert "Forbidden" in line

    bucket.fault = lambda method: 0
    beat = {"fast_beat": 0.2, "no_pictures": 1}
    run = begin(f"--workdir={B}/lost", slow_steps=0.5, **beat)
    run.until(lambda: "lost/metrics.jsonl" in bucket.names())
    bucket.fault = lambda method: 404
    assert run.status() == 2
    assert f"{B}/lost is lost" in run.text
    assert "Traceback" not in run.text


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="what a failed write leaves crashes this Python: python/cpython#111049",
)
def test_files_of_other_machines_are_seen(bucket, monkeypatch, caplog):
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend, "fsspec_backend", type(backend.fsspec_backend)())
    folder = epath.Path(f"{B}/run")
    storage.write_whole(folder / "one", "1")
    assert [path.name for path in folder.iterdir()] == ["one"]
    bucket.upload("test-bucket", "run/two", b"2")
    assert (folder / "two").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    bucket.remove("run/one")
    assert not (folder / "one").exists()
    posts = itertools.count()  # the second sends what was written to an open file
    bucket.fault = lambda method: 409 * (method == "POST" and next(posts) > 0)
    with pytest.raises(OSError, match="409"):
        (folder / "three").write_text("3")
    bucket.fault = lambda method: 0
    with (folder / "two").open("rb") as opened:
        bucket.fault = lambda method: 404
        with pytest.raises(OSError, match="two"):
            opened.read()
    bucket.fault = lambda method: 0
    assert not caplog.records
    file = storage.Appended(folder / "two", pause=60)
    for text in (b"3", b"4"):
        file.write(text)
    assert bucket.read("run/two") == b"23"
    file.close()
    assert bucket.read("run/two") == b"234"
