"""The long version of these tests, half an hour on two CPU cores:

    python -m pytest -n 0 -s tests/faults/soak.py

Not part of the suite. Kills a run and an encoding at random moments, damages all of a
checkpoint, and trains long enough for leaks to show; prints a line for each part.
SOAK_SEED=1 picks other moments, files and bits.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Config
from sra2_jax.errors import UserError
from sra2_jax.run import Run
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from tests.test_checkpoint import KEEP
from tests.test_train import rows

ROOT = Path(__file__).parents[2]
KILLS, FLIPS, STEPS, ENCODE_KILLS = 50, 200, 2000, 20
DRAW = random.Random(int(os.environ.get("SOAK_SEED", "0")))


def losses(workdir):
    return [(r["step"], r["loss"]) for r in rows(workdir) if "loss" in r]


@pytest.mark.timeout(3600)
def test_kills(start, command, tmp_path):
    """Killed 50 times at random, a run ends with the rows of one that was not."""
    run = [*command, "--config.steps=2000", "--config.run.sample_every=100000"]
    assert start(*run, f"--workdir={tmp_path / 'one'}").status(600) == 0
    run.append(f"--workdir={tmp_path / 'other'}")
    saving, phases, began = 0, {}, time.monotonic()
    for _ in range(KILLS):
        process = start(*run, slow_steps=0.05, slow_commit=0.1)
        time.sleep(DRAW.uniform(0, 12))
        saving += bool(list((tmp_path / "other").glob("checkpoints/*tmp*")))
        process.kill(signal.SIGKILL)
        assert process.status() == -signal.SIGKILL, process.text[-2000:]
        phase = "training" if "compile" in process.text else "starting"
        phases[phase] = phases.get(phase, 0) + 1
    assert start(*run).status(600) == 0
    assert losses(tmp_path / "other") == losses(tmp_path / "one")
    print(
        f"\n{KILLS} SIGKILLs ({phases}; {saving} while a checkpoint was written), "
        f"{time.monotonic() - began:.0f} s: all 1,000 rows equal"
    )


@pytest.fixture
def saved(start, command, tiny, tmp_path):
    """A run's checkpoint of step 12, the newest; how to restore; how to mend it."""
    run, spare = Run(tmp_path / "run"), tmp_path / "spare"
    assert start(*command, f"--workdir={run}").status(300) == 0
    abstract = Program(Config.of(tiny), make_mesh()).abstract
    shutil.copytree(run.checkpoints, spare)

    def restore():
        with Checkpoints(run, KEEP) as checkpoints:
            step, state, _ = checkpoints.restore_newest(abstract)
            return step, jax.device_get(state)

    def mend():
        shutil.rmtree(run.checkpoints)
        shutil.copytree(spare, run.checkpoints)

    return tmp_path / "run" / "checkpoints" / "12", restore, mend


def flip(path):
    """A random bit of a file."""
    data = bytearray(path.read_bytes())
    if data:
        bit = DRAW.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "emptied": lambda p: p.write_bytes(b""),
    "deleted": lambda p: p.unlink(),
}


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_damaged_checkpoints(saved):
    """Each file cut, emptied and deleted, 200 random bits flipped: the state restored
    is that of the step before, or, where the file does not matter, the very state."""
    newest, restore, mend = saved
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    weights = [(newest / f).stat().st_size for f in files]
    jobs = [(damage, f) for damage in ("cut", "emptied", "deleted") for f in files]
    for i in range(FLIPS):
        # half of them by size, where the numbers are; half in any file
        jobs.append(("flipped", DRAW.choices(files, weights if i % 2 else None)[0]))
    states, count = dict([restore()]), Counter()
    for damage, path in jobs:
        DAMAGES[damage](newest / path)
        try:
            step, state = restore()
            states.setdefault(step, state)
            jax.tree.map(np.testing.assert_array_equal, state, states[step])
            count[damage, f"step {step}"] += 1
        except UserError:
            count[damage, "refused"] += 1
        mend()
    print(f"\n{dict(count)}")
    assert {step for _, step in count} <= {"step 12", "step 8", "refused"}


@pytest.mark.timeout(3600)
def test_encoding(tmp_path):
    """Killed 20 times, twice a dataset: the same files, byte for byte."""

    def encode(name):
        command = [sys.executable, "-m", "sra2_jax", "encode", "--images=digits"]
        command += [f"--out={tmp_path / name}", "--vae=digits", "--resolution=32"]
        return subprocess.Popen([*command, "--shards=24", "--mirror"], cwd=ROOT)

    def contents(name):
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    assert encode("whole").wait() == 0
    kills, began = 0, time.monotonic()
    for i in range(ENCODE_KILLS // 2):
        for _ in range(2):
            process, work = encode(f"{i}"), tmp_path / f".{i}.incomplete"
            before = len(list(work.glob("facts*")))
            while process.poll() is None and len(list(work.glob("facts*"))) <= before:
                time.sleep(0.005)
            time.sleep(DRAW.uniform(0, 0.5))
            kills += process.poll() is None
            process.kill()
            process.wait()
        assert encode(f"{i}").wait() == 0
        assert contents(f"{i}") == contents("whole")
    assert not list(tmp_path.glob(".*"))
    print(
        f"\n{kills} SIGKILLs while encoding {ENCODE_KILLS // 2} datasets, "
        f"{time.monotonic() - began:.0f} s: all files equal"
    )


@pytest.mark.timeout(3600)
def test_leaks(start, command, tmp_path):
    """2,000 steps with 100 saves: memory grows by at most 5% after step 200; threads
    and open files do not."""
    workdir = tmp_path / "run"
    run = [*command, f"--workdir={workdir}", f"--config.steps={STEPS + 200}"]
    run += ["--config.run.checkpoint_every=20", "--config.run.sample_every=100000"]
    process = start(*run, slow_steps=0.01)
    seen = []
    while not seen or seen[-1][0] < STEPS:
        time.sleep(1)
        found = losses(workdir) if (workdir / "metrics.jsonl").exists() else []
        if found and found[-1][0] >= 200:
            seen.append((found[-1][0], *usage(process.pid)))
    assert process.status(300) == 0
    memory, threads, files = (np.array(x) for x in list(zip(*seen, strict=True))[1:])
    tenth = max(len(seen) // 10, 1)
    first, last = np.median(memory[:tenth]), np.median(memory[-tenth:])
    print(
        f"\nsteps {seen[0][0]} to {seen[-1][0]}: memory {first:.0f} to {last:.0f} MB "
        f"({last / first - 1:+.1%}), threads {threads.min()} to {threads.max()}, open "
        f"files {files.min()} to {files.max()}"
    )
    assert last <= 1.05 * first
    for values in (threads, files):  # a save in progress has some of its own
        assert np.median(values[-tenth:]) <= np.median(values[:tenth]) + 2


def usage(pid):
    """Resident MB, threads, open files."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    memory = int(fields["VmRSS"].split()[0]) / 1000
    return memory, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))
