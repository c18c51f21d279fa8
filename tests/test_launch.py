"""The launch script in its dry run: what it would do, and what it refuses."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "launch" / "tpu_pod.sh"
SET = {"TPU_NAME": "pod", "ZONE": "zone-a", "WORKDIR": "gs://bucket/run"}


def launch(variables, *arguments):
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1"} | variables
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )


def test_dry_run_prints_every_command():
    done = launch(SET, "--config=configs/sra2_xl.py", "--config.name=two words")
    assert done.returncode == 0
    archive, copy, start = done.stdout.split("gcloud compute")
    assert archive.startswith("git archive")
    assert "scp" in copy
    assert "pod:sra2_jax.tar.gz" in copy
    for part in ("ssh pod", "--worker=all", "--distributed", "gs://bucket/run"):
        assert part in start
    assert "configs/sra2_xl.py" in start


def test_refuses_without_its_variables():
    for name in SET:
        done = launch({k: v for k, v in SET.items() if k != name})
        assert done.returncode != 0
        assert name in done.stderr
        assert not done.stdout
