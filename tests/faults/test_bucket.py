"""A run whose folder, data and results are in a bucket: gs://, see bucket.py."""

import json
import signal

import pytest

from tests.faults.bucket import Bucket
from tests.test_train import rows, without_speed


@pytest.fixture
def bucket(latents):
    """A server, and the training digits in it."""
    server = Bucket()
    for path in latents.iterdir():
        server.upload("test-bucket", f"latents/{path.name}", path.read_bytes())
    yield server
    server.shutdown()
    server.server_close()


def text(bucket, name):
    return bucket.objects["test-bucket", name][2].decode()


def test_a_run_in_a_bucket_is_the_run_in_a_folder(start, command, bucket, tmp_path):
    """Trained, killed while it saves, gone on with, looked at, sampled and scored."""
    there = {"environment": bucket.environment()}
    folder, run = tmp_path / "run", "gs://test-bucket/run"
    start(*command, f"--workdir={folder}").status()

    remote = [
        *command,
        f"--workdir={run}",
        "--config.data.dir=gs://test-bucket/latents",
    ]
    killed = start(*remote, slow_commit=1, slow_steps=0.3, **there)
    eighth = "run/checkpoints/8/"
    killed.until(lambda: eighth in " ".join(bucket.names("test-bucket")))
    killed.kill(signal.SIGKILL).status()
    names = bucket.names("test-bucket")
    assert f"{eighth}commit_success.txt" not in names
    second = start(*remote, **there)
    assert second.status() == 42
    assert "was in use" in second.text
    assert "run/checkpoints/4/commit_success.txt" in names

    del bucket.objects["test-bucket", "run/lock.json"]  # a minute has gone by
    again = start(*remote, **there)
    assert again.status() == 0, again.text
    assert without_speed(rows(folder)) == without_speed(
        map(json.loads, text(bucket, "run/metrics.jsonl").splitlines())
    )
    for name in ("samples/step_00000010.png", "samples/step_00000012.png"):
        assert (
            bucket.objects["test-bucket", f"run/{name}"][2]
            == (folder / name).read_bytes()
        )
    events = [
        n for n in bucket.names("test-bucket") if n.startswith("run/tensorboard/events")
    ]
    assert len(events) == 2

    status = start("status", run, "gs://test-bucket/nothing", **there)
    assert status.status() == 2
    assert "step 12 of 12 (100.0%), finished" in status.text
    assert "checkpoint: step 12" in status.text
    assert "error: gs://test-bucket/nothing" in status.text
    sample = start(
        "sample", run, "--out=gs://test-bucket/s/out.npz", "--num=80", **there
    )
    assert sample.status() == 0, sample.text
    assert [n for n in bucket.names("test-bucket") if n.startswith("s/")] == [
        "s/out.npz"
    ]
    score = ["--reference=digits", "--split=test", "--features=digits"]
    evaluate = start("evaluate", "gs://test-bucket/s/out.npz", *score, **there)
    assert evaluate.status() == 0, evaluate.text
    assert json.loads(text(bucket, "s/out.json"))["num_samples"] == 80
