"""Encoding that is killed, resumed and shared: the same bytes whatever happened."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageOps

from sra2_jax.data import images, records
from sra2_jax.data.check import faults
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.data.order import permutation
from sra2_jax.errors import UserError
from sra2_jax.tfrecord import Shard
from tests.test_pipeline import read_all

ROOT = Path(__file__).parents[1]
VAE = str(ROOT / "tests" / "golden" / "vae")
SIDE, COUNT, SHARDS = 16, 26, 4
FLAGS = {"shards": SHARDS, "batch_size": 8, "max_bad": 0.2}
FLAGS |= {"vae": VAE, "resolution": SIDE}


def run(source, out, progress=lambda count: None, **changes):
    options = FLAGS | changes
    return encode(EncodeOptions(images=str(source), out=str(out), **options), progress)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "source"
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(path)
    (folder / "class0" / "0.png").write_bytes(b"not an image")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """What nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    run(source, out)
    assert [path.name for path in out.parent.iterdir()] == ["latents"]
    return out


@pytest.fixture(scope="module")
def whole(built):
    return contents(built)


def test_manifest(whole, built, tmp_path):
    info = json.loads(whole[records.FILE])
    shards = info["splits"]["train"]
    places = permutation(COUNT, 0)
    # Image 0 is unreadable.
    wanted = [[i for i in places[s::SHARDS] if i] for s in range(SHARDS)]
    assert shards["records"] == [len(part) for part in wanted]
    names = sorted(name for name in whole if "tfrecord" in name)
    assert shards["bytes"] == [len(whole[name]) for name in names]
    for name, part, digest in zip(names, wanted, shards["sha256"], strict=True):
        assert hashlib.sha256(whole[name]).hexdigest() == digest
        (tmp_path / name).write_bytes(whole[name])
        shard = Shard(tmp_path / name)
        rows = [(shard, i) for i in range(len(shard))]
        rows = records.read(rows, records.LatentsInfo.read(built))
        assert rows["index"].tolist() == part  # mixed over the classes
    assert whole["unreadable.txt"].startswith(b"class0/0.png\t")


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


# Files get their names in the order shard, facts, ...; the folder at last; then the
# facts go.
@pytest.mark.parametrize("number", [1, 2, 3, *range(8, 16)])
def test_killed_at_any_change_of_a_name(source, whole, tmp_path, monkeypatch, number):
    out, count = tmp_path / "latents", 0
    names = ("rename", "replace", "unlink")
    kinds = Path, type(epath.Path(tmp_path))  # etils' own do not call pathlib's

    def dying(original):
        def call(*arguments, **named):
            nonlocal count
            count += arguments[0].exists()
            if count == number:
                raise Killed
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for kind, name in itertools.product(kinds, names):
            patch.setattr(kind, name, dying(getattr(kind, name)))
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        try:
            run(source, out)
        except Killed:
            pass
        else:
            assert number == 15  # there were fewer
        assert not (out / records.FILE).exists() or contents(out).keys() >= whole.keys()
    seen = []
    run(source, out, progress=seen.append)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    if number >= 3:  # shard 0 and its facts had their names
        assert sum(seen) <= COUNT - 7


def test_killed_and_shared_by_processes(source, whole, tmp_path, start):
    """SIGKILL at several moments, then two processes of another count at once."""
    out = tmp_path / "latents"
    work = tmp_path / ".latents.incomplete"
    command = [
        *("encode", f"--images={source}"),
        *(f"--out={out}", f"--vae={VAE}", f"--resolution={SIDE}", "--max_bad=0.2"),
        *(f"--shards={SHARDS}", "--batch_size=8"),
    ]

    first = start(*command, devices=8)
    first.until(lambda: list(work.glob("*.tfrecord-*"))).kill(signal.SIGKILL).status()
    assert not out.exists()
    flags = [f"--process_index={i}" for i in range(2)]
    pair = [start(*command, "--process_count=2", flag, devices=8) for flag in flags]
    assert [process.status() for process in pair] == [0, 0]
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_processes_one_after_another(source, whole, tmp_path):
    out = tmp_path / "latents"
    both = [run(source, out, process_index=i, process_count=2) for i in (1, 0)]
    assert both == [None, records.LatentsInfo.read(out)]
    assert contents(out) == whole
    # Done is done, for a process that comes late as well.
    again = run(source, out, process_index=1, process_count=2)
    assert again == both[1]


def test_half_done_work_is_not_mixed(source, whole, tmp_path):
    out = tmp_path / "latents"
    half = {"process_index": 0, "process_count": 2}
    assert run(source, out, **half) is None
    for changes, match in [
        ({"shards": 3}, "shards: 4 there, 3 now"),
        ({"batch_size": 16}, "batch_size: 8 there, 16 now"),
        ({"mirror": True}, "mirror: False there, True now"),
        ({"resolution": 8}, "resolution: 16 there, 8 now"),
        ({"vae": "digits"}, r"vae: .* there, 'digits' now"),
    ]:
        with pytest.raises(UserError, match=match):
            run(source, out, **changes)
    (source / "class1" / "later.png").write_bytes(b"")
    try:
        with pytest.raises(UserError, match=r"\(listing: .* there, .* now\)"):
            run(source, out)
    finally:
        (source / "class1" / "later.png").unlink()
    assert not out.exists()
    # A shard that was lost, or cut, is written again.
    lost = next((tmp_path / ".latents.incomplete").glob("*-00002-of-*"))
    lost.write_bytes(lost.read_bytes()[:-1])
    run(source, out)
    assert contents(out) == whole


def test_two_processes_of_one_index_write_the_same(source, whole, tmp_path):
    """A mistake: one begins while the other is at work, and ends first."""
    out, begun = tmp_path / "latents", []

    def progress(count):
        if not begun:
            begun.append(run(source, out))

    with pytest.raises(UserError, match="another process at work there"):
        run(source, out, progress)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_source_read_in_passes(source, built, tmp_path, monkeypatch):
    """As TFDS: several shards are written in one pass over the source, in its order."""
    folder = images.open_source
    passes = []

    def sequential(*arguments):
        listing = folder(*arguments)

        def entries(indices):
            passes.append(len(indices))
            return (e for e in listing.entries() if e.index in indices)

        return dataclasses.replace(listing, entries=entries, at_once=3)

    monkeypatch.setattr(images, "open_source", sequential)
    run(source, tmp_path / "latents")
    assert passes == [20, 6]
    info, wanted = map(records.LatentsInfo.read, (tmp_path / "latents", built))
    assert info.splits["train"].records == wanted.splits["train"].records
    found, wanted = (read_all(d) for d in (tmp_path / "latents", built))
    assert found.keys() == wanted.keys()
    assert all((found[i]["mean"] == wanted[i]["mean"]).all() for i in wanted)


def test_mirrored_records(source, tmp_path):
    """They are what encoding the mirrored images gives."""
    flipped = tmp_path / "flipped"
    shutil.copytree(source, flipped)
    for path in flipped.glob("*/[1-9]*.png"):
        ImageOps.mirror(Image.open(path)).save(path)
    info = run(source, tmp_path / "both", store_images=True, mirror=True)
    plain = run(source, tmp_path / "plain", store_images=True)
    run(flipped, tmp_path / "mirrored", store_images=True)
    assert (info.num_examples, plain.num_examples) == (50, 25)
    assert (info.mirror_offset, plain.mirror_offset) == (26, 0)
    assert faults(tmp_path / "both", info) == []
    both, one, other = (
        read_all(tmp_path / name) for name in ("both", "plain", "mirrored")
    )
    assert set(both) == set(one) | {i + 26 for i in one}
    for index in one:
        for stored, wanted in ((index, one), (index + 26, other)):
            for name in ("image", "label"):
                np.testing.assert_array_equal(both[stored][name], wanted[index][name])
            for name in ("mean", "std"):
                np.testing.assert_allclose(
                    both[stored][name], wanted[index][name], rtol=2e-3, atol=1e-4
                )
    mirrored = np.stack([both[i + 26]["mean"] for i in one])
    latents = np.stack([both[i]["mean"][:, ::-1] for i in one])
    assert np.abs(mirrored - latents).max() > 0.01  # mirroring latents is not the same
