"""Damage to a dataset is found and named, by the program and while training."""

import dataclasses

import numpy as np
import pytest

from sra2_jax.data.build import writing
from sra2_jax.data.check import faults, run_check
from sra2_jax.errors import UserError
from tests.test_pipeline import damage, take, write_dataset

NAME = "latents-train.tfrecord-{:05d}-of-00008"


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "latents"
    return folder, write_dataset(folder)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flip", "record 6 has another checksum"),
        ("cut", "1199 bytes, 1209 when it was encoded"),
        ("junk", "1214 bytes, 1209 when it was encoded"),
        ("empty", "0 bytes, 1209 when it was encoded"),
        ("missing", "missing"),
        ("copy", "SHA-256 differs; every record can be read"),
    ],
)
def test_damage_is_named(dataset, how, reason):
    folder, info = dataset
    assert faults(folder, info) == []
    path, other = folder / NAME.format(5), folder / NAME.format(1)
    if how == "copy":
        path.write_bytes(other.read_bytes())
    elif how == "empty":
        path.write_bytes(b"")
    else:
        damage(path, how)
    ((name, found),) = faults(folder, info)
    assert name == path.name
    assert found.startswith(reason)


def test_every_flipped_byte_is_found(dataset):
    folder, info = dataset
    path = folder / NAME.format(2)
    whole = path.read_bytes()
    for position in range(0, len(whole), 197):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert [name for name, _ in faults(folder, info)] == [path.name]


def test_without_sums_records_are_counted(dataset):
    """As datasets have it that were made before sums were kept."""
    folder, info = dataset
    shards = dataclasses.replace(info.splits["train"], sha256=())
    assert faults(folder, dataclasses.replace(info, splits={"train": shards})) == []
    shards = dataclasses.replace(shards, records=(12, 14, *shards.records[2:]))
    found = faults(folder, dataclasses.replace(info, splits={"train": shards}))
    assert found == [
        (NAME.format(0), "13 records, 12 when it was encoded"),
        (NAME.format(1), "13 records, 14 when it was encoded"),
    ]


def test_owners_without_a_name(dataset, monkeypatch):
    """As in containers and on network disks."""
    folder, info = dataset

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("grp.getgrgid", unknown)
    assert faults(folder, info) == []
    assert take(folder, 1)["index"].size


def test_program(dataset, capsys, start):
    folder, _ = dataset
    assert run_check(folder) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: no faults, 103 records, ")
    (folder / NAME.format(3)).unlink()
    damage(folder / NAME.format(5), "flip")
    (folder / "latents-train.tfrecord-00003-of-00009").write_bytes(b"")
    done = start("encode", f"--check={folder}")
    assert done.status() == 1
    lines = done.text.splitlines()
    assert lines.pop().startswith(f"{folder}: 3 faults")
    said = dict(line.split(": ", 1) for line in lines)
    assert said.pop(NAME.format(5)).startswith("record 6 has another checksum")
    assert said == {
        NAME.format(3): "missing",
        "latents-train.tfrecord-00003-of-00009": "not in latents.json: remove it",
    }


def test_writer_leaves_nothing_that_looks_whole(tmp_path):
    latents = dict.fromkeys(("mean", "std"), np.zeros((2, 2, 1), np.float16))
    large = {"mean": np.full((2, 2, 1), 1e5), "std": latents["std"]}

    def fail(index, arrays):
        with writing(tmp_path, "train", np.array([0, 1, 0]), [0]) as writer:
            writer.write(0, 0, **latents)
            assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
            writer.write(0, index, **arrays)

    for index, arrays in ((1, latents), (2, large)):  # of the other shard; too large
        with pytest.raises((KeyError, UserError)):
            fail(index, arrays)
        assert not list(tmp_path.iterdir())
