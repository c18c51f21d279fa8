"""Checkpoints: what is kept, what is refused, what is noticed."""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra2_jax import config
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.errors import Restart, UserError
from sra2_jax.fingerprint import fingerprints
from sra2_jax.run import Run
from tests.conftest import one_line

ROOT = Path(__file__).parents[1]
KEEP = config.Run(keep_checkpoints=3, keep_best=0)


def opened(folder, keep=KEEP, **named):
    """The checkpoints in FOLDER/checkpoints."""
    return Checkpoints(Run(folder), keep, **named)


def some_state(seed=0):
    """Arrays of every type that a state may hold."""
    draw = np.random.default_rng(seed)
    return {
        "step": jnp.asarray(7, jnp.int32),
        "params": {
            "kernel": jnp.asarray(draw.normal(size=(16, 24)), jnp.float32),
            "half": jnp.asarray(draw.normal(size=40), jnp.bfloat16),
            "small": jnp.asarray(draw.integers(0, 255, 9), jnp.uint8),
            "flags": jnp.asarray([True, False]),
        },
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def test_saved_is_what_can_be_read_back(tmp_path):
    """Orbax was seen to report success and leave no manifest."""
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, some_state())
        manifest = checkpoints.folder / "1" / "state" / "manifest.ocdbt"
        while not manifest.exists():
            time.sleep(0.01)
        manifest.unlink()
        with pytest.raises(Restart, match="step 1 is not there as it was saved"):
            checkpoints.wait()


def test_fingerprints_do_not_depend_on_the_sharding():
    x = jnp.arange(64 * 8, dtype=jnp.float32).reshape(64, 8)
    found = set()
    for count in (1, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), "d")
        for spec in (PartitionSpec(), PartitionSpec("d"), PartitionSpec(None, "d")):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            found.add(fingerprints({"x": placed})[0]["x"])
    assert len(found) == 1
    # the sum itself, from its definition
    place = np.arange(512, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> np.uint64(shift))) * np.uint64(factor) & mask
    odd = (place ^ (place >> np.uint64(16))) | np.uint64(1)
    bits = np.asarray(x).ravel().view(np.uint32).astype(np.uint64)
    assert found == {int((bits * odd & mask).sum() & mask)}


def test_every_change_changes_a_fingerprint():
    """Every bit of some elements of every type; two elements or two leaves swapped."""
    state = some_state()
    whole, bad = fingerprints(state)
    assert bad == []
    assert set(whole) == {
        "step", "params/kernel", "params/half", "params/small", "params/flags"
    }  # fmt: skip
    kernel = np.array(state["params"]["kernel"])
    for bit in range(32):
        changed = kernel.copy()
        changed.view(np.uint32)[5, 7] ^= np.uint32(1 << bit)
        found, _ = fingerprints({"params": {"kernel": jnp.asarray(changed)}})
        assert found["params/kernel"] != whole["params/kernel"]
    swapped = kernel.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    found, _ = fingerprints({"params": {"kernel": jnp.asarray(swapped)}})
    assert found["params/kernel"] != whole["params/kernel"]
    flipped = state["params"]["flags"][::-1]
    assert fingerprints([flipped])[0]["0"] != whole["params/flags"]


def test_what_is_kept(tmp_path):
    """The newest two, every tenth step, and the two best of those with a score, which
    comes after the save."""
    scores, known = {}, {4: 3.0, 7: 1.0, 13: 2.0, 16: 5.0}
    every = {"log_every": 1, "checkpoint_every": 1, "keep_every": 10}
    keep = config.Run(keep_checkpoints=2, keep_best=2, **every)
    with opened(tmp_path, keep, score=lambda s: scores.get(s, float("inf"))) as saver:
        for step in range(4, 26, 3):
            saver.save(step, some_state(), [{"loss": 0.1}])
            saver.wait()
            scores |= {step: known[step]} if step in known else {}
        saver.save(30, some_state())
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {7, 10, 13, 25, 30}


def changed_targets(state):
    kernel = state["params"]["kernel"]
    more = {"params": state["params"] | {"extra": kernel}}
    fewer = {k: v for k, v in state["params"].items() if k != "kernel"}
    return {
        "shape": ({"params": fewer | {"kernel": kernel[1:]}}, "kernel"),
        "dtype": ({"params": fewer | {"kernel": kernel.astype(jnp.int32)}}, "kernel"),
        "extra": (more, "params/extra is missing there"),
        "missing": ({"params": fewer}, "kernel"),
        "renamed": ({"params": fewer | {"kernal": kernel}}, "params/kernal"),
        "another optimizer": ({"opt_state": [kernel]}, "opt_state/0"),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2, to copy."""
    folder = tmp_path_factory.mktemp("saved")
    with opened(folder) as saver:
        for step in (1, 2):
            saver.save(step, some_state(step), [{"loss": 0.1 * step}])
    return folder


@pytest.mark.parametrize("kind", changed_targets(some_state()))
def test_another_model_is_refused_and_nothing_is_renamed(saved, kind):
    wanted, name = changed_targets(some_state())[kind]
    with opened(saved) as checkpoints, one_line("is of another model: ", name):
        checkpoints.restore_newest(abstract(some_state() | wanted))
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}


def content(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def flip(path):
    """A bit in the middle of a file of some size, where the numbers are."""
    bits = bytearray(path.read_bytes())
    if len(bits) > 400:
        bits[len(bits) // 2] ^= 4
        path.write_bytes(bits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("litter")
@pytest.mark.parametrize(
    "damage", ["flip", "empty", "no fingerprint", "no state", "a pickle", "only it"]
)
def test_damage_is_set_aside(saved, tmp_path, damage):
    """A run goes on from the checkpoint before; a reader only refuses."""
    folder = shutil.copytree(saved, tmp_path / "c") / "checkpoints"
    newest, heard = folder / "2", []
    files = [p for p in newest.glob("state/**/*") if p.is_file()]
    if damage == "flip":
        for path in files:
            flip(path)
    elif damage == "no fingerprint":
        shutil.rmtree(newest / "fingerprint")
    elif damage == "no state":
        shutil.rmtree(newest / "state")
    elif damage == "a pickle":
        shutil.rmtree(newest / "state")
        (newest / "state").write_bytes(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.")
    else:
        max(files, key=lambda p: p.stat().st_size).write_bytes(b"")
    if damage == "only it":
        shutil.rmtree(folder / "1")

    before = content(folder)
    with (
        opened(folder.parent, None) as reader,
        pytest.raises(UserError, match=r"checkpoint .*2 is damaged"),
    ):
        reader.restore(abstract(some_state()))
    assert content(folder) == before

    with opened(folder.parent, report=heard.append) as checkpoints:
        if damage == "only it":
            with pytest.raises(UserError, match="all checkpoints are damaged"):
                checkpoints.restore_newest(abstract(some_state()))
            assert (folder / "damaged-2").exists()
            return
        step, state, unlogged = checkpoints.restore_newest(abstract(some_state()))
        assert (step, unlogged) == (1, [{"loss": 0.1}])
        jax.tree.map(np.testing.assert_array_equal, state, some_state(1))
        assert "2 is damaged (" in heard[0]
        checkpoints.save(2, some_state(9))  # the same step again
    assert {p.name for p in folder.iterdir()} == {"1", "2", "damaged-2"}
    part = {"params": {"kernel": abstract(some_state())["params"]["kernel"]}}
    with opened(folder.parent, None) as reader:
        found = reader.restore(part)["params"]["kernel"]
    np.testing.assert_array_equal(found, some_state(9)["params"]["kernel"])


def test_what_is_not_damage_is_not_set_aside(saved, tmp_path, monkeypatch):
    """A login that has run out, a folder of something else that looks like a step; nor
    is what is not finite saved."""
    folder, state = shutil.copytree(saved, tmp_path / "c"), some_state()
    state["params"]["half"] = state["params"]["half"].at[3].set(jnp.nan)

    def refuse(*args, **options):
        raise ValueError("opening the state") from PermissionError(13, "denied")

    with opened(folder) as checkpoints, monkeypatch.context() as patch:
        with one_line("step 3 is not saved: params/half is not finite"):
            checkpoints.save(3, state)
        patch.setattr(ocp.CheckpointManager, "restore", refuse)
        with one_line("PermissionError", "denied: mend it and run"):
            checkpoints.restore_newest(abstract(state))
    foreign = folder / "checkpoints" / "5"
    foreign.mkdir()
    (foreign / "photo.png").write_bytes(b"")
    (foreign.parent / "6").write_bytes(b"\x80\x04.")  # a file
    with opened(folder) as checkpoints, one_line("5 is no checkpoint of a run: move"):
        checkpoints.restore_newest(abstract(state))
    assert {p.name for p in foreign.parent.iterdir()} == {"1", "2", "5", "6"}
    for name in "125":
        shutil.rmtree(foreign.parent / name)
    with (
        opened(folder, None) as checkpoints,
        one_line("no checkpoint of step any:", "has steps none"),
    ):
        checkpoints.restore(abstract(state))
    with one_line("no such folder: give the workdir of a run"):
        opened(tmp_path / "nothing", None)


def full_disk(folder, limit):
    """Saves, from a process that may write `limit` bytes a file, then any."""
    checkpoints = opened(folder)
    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
    checkpoints.save(1, state)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    again = r"a step could not be saved \(.* to go on from the last checkpoint$"
    with pytest.raises(Restart, match=again):  # noqa: PT012
        checkpoints.save(2, state)
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    again = opened(folder)  # as the same command does
    step, restored, _ = again.restore_newest(abstract(state))
    assert step == 1
    np.testing.assert_array_equal(restored["x"], state["x"])
    again.save(3, state)
    again.wait()
    shutil.move(folder, f"{folder}.moved")
    with pytest.raises(UserError, match="is gone: step 4 is not"):
        again.save(4, state)
    print("fine")


def test_a_full_disk_and_a_lost_folder(tmp_path):
    """A save that fails ends the run, which goes on from the one before; a folder that
    is gone, too. (A process of its own: the limit is the process's.)"""
    program = (
        "import sys, os; sys.path.insert(0, '.'); import tests.test_checkpoint as t; "
        f"t.full_disk({str(tmp_path / 'c')!r}, 20_000); sys.stdout.flush(); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True
    )
    assert done.stdout.endswith("fine\n"), done.stderr[-3000:]
