"""Damage to a dataset is found and named, by the program and while training."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sra2_jax.data.shards import ShardWriter

from sra2_jax.data import records
from sra2_jax.data.check import faults, run_check
from sra2_jax.data.encode import encode
from tests.test_pipeline import damage, swap, write_dataset

NAME = "latents-train.tfrecord-{:05d}-of-00008"


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "latents"
    return folder, write_dataset(folder)


def named(folder):
    return dict(faults(folder, records.LatentsInfo.read(folder)))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flip", "record 6 is damaged (corrupted record at "),
        ("cut", "truncated to "),
        ("empty", "empty, "),
        ("missing", "missing"),
        ("junk", "5 bytes too many at its end"),
        ("copy", "a copy of shard 1"),
        ("last record", "truncated to "),
        ("another record", "other bytes than encoded (SHA-256 "),
    ],
)
def test_damage_is_named(dataset, how, reason):
    folder, _ = dataset
    assert named(folder) == {}
    path = folder / NAME.format(5)
    if how == "copy":
        swap(folder, 5, 1)
    elif how == "empty":
        path.write_bytes(b"")
    elif "record" in how:
        rows = [
            row.numpy() for row in records.tensorflow().data.TFRecordDataset(str(path))
        ]
        latent = np.full((2, 2, 1), 3, np.float16)
        last = [records.serialize(latent, latent, 1, 101)]
        with records.tensorflow().io.TFRecordWriter(str(path)) as writer:
            for row in rows[:-1] + (last if how == "another record" else []):
                writer.write(row)
    else:
        damage(path, how)
    found = named(folder)
    assert list(found) == [path.name]
    assert found[path.name].startswith(reason)


def test_every_flipped_byte_is_found(dataset):
    folder, info = dataset
    path = folder / NAME.format(2)
    whole = path.read_bytes()
    for position in range(0, len(whole), 197):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert [name for name, _ in faults(folder, info)] == [path.name]


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (3, {"index": 2}, "index 2 twice, in records 0 and 3"),
        (3, {"index": 27}, "record 3 has index 27, of another shard"),
        (3, {"index": -6}, "record 3 has index -6, of another shard"),
        (12, {"index": 802}, "indices 2 to 802, 2 to 98 when it was encoded"),
        (4, {"label": 10}, "record 4: label 10, not in [0, 10)"),
        (5, {"mean": np.nan}, "record 5: mean is not finite"),
        (5, {"std": -np.inf}, "record 5: std is not finite"),
    ],
)
def test_wrong_contents_are_named(dataset, row, change, reason):
    """Also where the bytes are those of the manifest."""
    folder, info = dataset
    path = folder / NAME.format(2)
    with records.tensorflow().io.TFRecordWriter(str(path)) as writer:
        for i, index in enumerate(range(2, 103, 8)):
            fields = {"mean": index, "std": index / 2, "label": 0, "index": index}
            fields |= change if i == row else {}
            for name in ("mean", "std"):
                fields[name] = np.full((2, 2, 1), fields[name], np.float16)
            writer.write(records.serialize(**fields))
    shards = info.splits["train"]
    sums, sizes = list(shards.sha256), list(shards.bytes)
    sums[2], sizes[2] = (
        hashlib.sha256(path.read_bytes()).hexdigest(),
        path.stat().st_size,
    )
    shards = dataclasses.replace(shards, sha256=sums, bytes=sizes)
    info = dataclasses.replace(info, splits={"train": shards})
    assert faults(folder, info) == [(path.name, reason)]


def test_a_manifest_without_sums(dataset):
    folder, info = dataset
    shards = info.splits["train"]
    old = dataclasses.replace(shards, sha256=(), first=(), last=())
    dataclasses.replace(info, splits={"train": old}).write(folder)
    assert named(folder) == {}
    swap(folder, 5, 1)
    assert named(folder) == {NAME.format(5): "record 0 has index 1, of another shard"}


def test_program(dataset, capsys):
    folder, _ = dataset
    assert run_check(folder) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: no faults, 103 records in 8 shards")
    (folder / NAME.format(3)).unlink()
    damage(folder / NAME.format(5), "flip")
    (folder / "latents-train.tfrecord-00003-of-00009").write_bytes(b"")
    command = [sys.executable, "-m", "sra2_jax.data.encode", f"--check={folder}"]
    root = Path(__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines.pop().startswith(f"{folder}: 3 faults")
    said = dict(line.split(": ", 1) for line in lines)
    assert said.pop(NAME.format(5)).startswith("record ")
    assert said == {
        NAME.format(3): "missing",
        "latents-train.tfrecord-00003-of-00009": "not in latents.json: remove it",
    }
    assert not done.stderr  # not TensorFlow's word either


def test_images_and_features(tmp_path):
    folder = tmp_path / "latents"
    info = encode(
        "digits", folder, "digits", 32, split="test", store_images=True,
        encoder="digits", grid=4,
    )  # fmt: skip
    assert faults(folder, info) == []
    path = next(folder.glob("*-00003-of-*"))
    damage(path, "flip")
    ((name, reason),) = faults(folder, info)
    assert name == path.name
    assert "is damaged" in reason


def test_writer_leaves_nothing_that_looks_whole(tmp_path):
    latent = np.zeros((2, 2, 1), np.float16)

    def fail():
        with ShardWriter(tmp_path, "train", 2, [0]) as writer:
            writer.write(latent, latent, 0, 0)
            assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
            writer.write(latent, latent, 0, 1)  # of the other shard

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
