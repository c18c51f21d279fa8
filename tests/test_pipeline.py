"""The schema of a latents dataset and the order of the batches read from it."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra2_jax.data import records
from sra2_jax.data.build import manifest, writing
from sra2_jax.data.order import Order, permutation
from sra2_jax.data.pipeline import batches, prefetch_to_device
from sra2_jax.errors import UserError
from sra2_jax.tfrecord import Shard
from tests.conftest import one_line

EXAMPLES, SHARDS, BATCH = 103, 8, 8
PERMUTATION = [1, 7, 0, 3, 5, 4, 6, 2]  # as it was when the order was chosen


def write_dataset(folder, examples=EXAMPLES, label=lambda index: index % 10, **extra):
    """A dataset of (2, 2, 1) latents that hold their own index; `extra` in each."""
    folder.mkdir()
    shard_of = np.arange(max(examples, SHARDS)) % SHARDS
    with writing(folder, "train", shard_of, range(SHARDS)) as writer:
        for index in range(examples):
            latent = np.full((2, 2, 1), index, np.float16)
            writer.write(label(index), index, mean=latent, std=latent / 2, **extra)
    info = records.LatentsInfo(
        vae="vae",
        scaling_factor=0.18215,
        shift_factor=0.0,
        resolution=16,
        latent_shape=(2, 2, 1),
        num_examples=examples,
        num_classes=10,
        class_names=(),
        splits={"train": manifest(list(writer.facts.values()))},
        latent_mean=(0.0,),
        latent_std=(1.0,),
        crop="centre",
        versions={},
    )
    info.write(folder)
    return info


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "latents"
    write_dataset(folder)
    return folder


ORDER = Order(BATCH, seed=0, shuffle_buffer=40)


def take(folder, steps, start=0, fields=(), process=(0, 1), **changes):
    """`steps` batches, stacked by key."""
    order = dataclasses.replace(ORDER, **changes)
    rows = list(
        itertools.islice(batches(folder, order, start, fields, *process), steps)
    )
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def read_all(folder):
    """{index: row} of all records."""
    info = records.LatentsInfo.read(folder)
    stored = {"image": info.images, "features": info.features}
    fields = [name for name, there in stored.items() if there]
    found = {}
    for path in folder.glob("*.tfrecord-*"):
        shard = Shard(path)
        rows = records.read([(shard, i) for i in range(len(shard))], info, fields)
        names, values = rows.keys(), zip(*rows.values(), strict=True)
        found |= {
            int(row["index"]): row
            for row in (dict(zip(names, v, strict=True)) for v in values)
        }
    return found


# Schema


def test_float16_survives_exactly(dataset):
    """TFDS reads the same, see test_encode."""
    rows = read_all(dataset)
    assert set(rows) == set(range(EXAMPLES))
    for index, row in rows.items():
        latent = np.full((2, 2, 1), index, np.float16)
        assert row["mean"].dtype == row["std"].dtype == np.float16
        np.testing.assert_array_equal(row["mean"], latent)
        np.testing.assert_array_equal(row["std"], latent / 2)
        assert row["label"] == index % 10


@pytest.mark.parametrize(
    "text",
    [
        *(None, "{", "[]", '{"format": 2}'),
        {"splits": {"train": {}}},
        {"splits": {"../train": {"records": [103], "bytes": [1]}}},
    ],
)
def test_missing_or_garbled_description(dataset, tmp_path, text):
    if isinstance(text, dict):
        text = json.dumps(json.loads((dataset / records.FILE).read_text()) | text)
    if text is not None:
        (tmp_path / records.FILE).write_text(text)
    with one_line(match=f"{tmp_path}.*sra2_jax encode --images=SOURCE"):
        records.LatentsInfo.read(tmp_path)


def test_description_without_the_newer_keys(dataset, tmp_path):
    fields = json.loads((dataset / records.FILE).read_text())
    del fields["images"], fields["features"]
    (tmp_path / records.FILE).write_text(json.dumps(fields))
    assert records.LatentsInfo.read(tmp_path) == records.LatentsInfo.read(dataset)


@pytest.fixture
def fitting():
    """A config that fits `write_dataset`."""
    factors = {"scaling_factor": 0.18215, "shift_factor": 0.0, "mean": (), "std": ()}
    return SimpleNamespace(
        data=SimpleNamespace(resolution=16, num_classes=10),
        latents=SimpleNamespace(size=2, channels=1, **factors),
        model=SimpleNamespace(patch_size=2),
        feature_readers=lambda: {"encoder": SimpleNamespace(model="digits", width=64)},
    )


def contradictions(info, config, fields=()):
    with one_line(match=r"^folder: .*encode again.*\(python") as error:
        records.check(info, "folder", config, fields)
    return re.findall(
        r"config says (\S+), dataset was encoded with (.*?):", str(error.value)
    )


def test_check_names_every_contradiction(dataset, fitting):
    info = records.LatentsInfo.read(dataset)
    records.check(info, "folder", fitting)
    fitting.data = SimpleNamespace(resolution=256, num_classes=11)
    factors = {"scaling_factor": 1.0, "shift_factor": 0.5, "mean": (2.0,), "std": ()}
    fitting.latents = SimpleNamespace(size=32, channels=4, **factors)
    assert contradictions(info, fitting) == [
        ("data.resolution=256", "16"),
        ("latents.size=32", "2"),
        ("latents.channels=4", "1"),
        ("data.num_classes=11", "10"),
        ("latents.scaling_factor=1.0", "0.18215"),
        ("latents.shift_factor=0.5", "0.0"),
        ("latents.mean=(2.0,)", "()"),
    ]


def test_check_compares_features(dataset, fitting):
    plain = records.LatentsInfo.read(dataset)
    features = records.Features("digits", grid=1, width=64)
    info = dataclasses.replace(plain, features=features)
    records.check(info, "folder", fitting, ("features",))
    fitting.model.patch_size = 1
    fitting.feature_readers = dict
    records.check(info, "folder", fitting)  # reads none
    other = SimpleNamespace(model="other", width=768)
    fitting.feature_readers = lambda: {"encoder": other}
    assert contradictions(info, fitting, ("features",)) == [
        ("align.encoder.model=other", "digits"),
        ("align.encoder.width=768", "64"),
        ("model.patch_size=1", "2"),
    ]
    for name, flag in (("features", "--encoder=MODEL"), ("image", "--store_images")):
        with one_line(match=f"no {name}; encode again with {flag}"):
            records.check(plain, "folder", fitting, (name,))
        with one_line(match=f"no {name}; encode again with {flag}"):
            batches(dataset, ORDER, fields=(name,))


# Order of the batches


def test_order_does_not_depend_on_processes(dataset):
    whole = take(dataset, 30)
    for count in (2, 4, 8):
        parts = [take(dataset, 30, process=(i, count)) for i in range(count)]
        for key, value in whole.items():
            joined = np.concatenate([part[key] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, value)
    kinds = {"mean": "float16", "std": "float16", "label": "int32", "index": "int64"}
    assert {name: value.dtype.name for name, value in whole.items()} == kinds
    np.testing.assert_array_equal(whole["mean"][..., 0, 0, 0], whole["index"])
    np.testing.assert_array_equal(whole["label"], whole["index"] % 10)


# An epoch is 12 steps and 7 rows.
def test_resume_continues_exactly(dataset):
    whole = take(dataset, 60)
    for start in (1, 12, 13, 14, 39, 57):
        tail = take(dataset, min(60 - start, 15), start)
        for key, value in whole.items():
            np.testing.assert_array_equal(tail[key], value[start : start + 15])


@pytest.mark.parametrize("shuffle_buffer", [1, 30, 40, 60, 1000])
def test_an_epoch_visits_each_record_once(dataset, shuffle_buffer):
    index = take(dataset, 45, shuffle_buffer=shuffle_buffer)["index"].ravel()
    epochs = [index[e * EXAMPLES : (e + 1) * EXAMPLES] for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(EXAMPLES))
    assert not np.array_equal(epochs[0], epochs[1])


def test_seeds_differ_and_repeat(dataset):
    first, again, other = (take(dataset, 5, seed=s)["index"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # The order is a promise: of Philox and SeedSequence, whatever their versions.
    assert permutation(8, 0, 1, 2).tolist() == PERMUTATION


def mixing(labels, batch=256, window=100):
    """How well the classes of rows are mixed: effective classes in a batch and in 100
    batches, correlation of the mean label of a batch with the next one's, and share of
    labels within 50 of the batch's median; all batches of an epoch."""
    rows = labels[: len(labels) // batch * batch].reshape(-1, batch)

    def effective(rows):
        shares = [np.unique(row, return_counts=True)[1] / len(row) for row in rows]
        return np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares])

    windows = rows[: len(rows) // window * window].reshape(-1, window * batch)
    means, medians = rows.mean(1), np.median(rows, axis=1)
    near = (abs(rows - medians[:, None]) <= 50).mean()
    correlation = np.corrcoef(means[:-1], means[1:])[0, 1]
    return effective(rows), effective(windows), correlation, near


@pytest.mark.parametrize("written", ["shuffled", "sorted"])
def test_mixed_as_by_a_uniform_shuffle_at_the_size_of_imagenet(written):
    """On labels alone. Sorted: as earlier versions wrote a folder, round robin."""
    counts = np.full(1000, 1300)  # as 895 classes of ImageNet have
    counts[::9][:105] = 1120
    labels = np.repeat(np.arange(1000), counts)
    shards = 256
    written_as = np.arange(len(labels))
    if written == "shuffled":
        written_as = permutation(len(labels), 0)
    sizes = [len(labels[s::shards]) for s in range(shards)]
    order = Order(256, seed=0, shuffle_buffer=16384)
    rows, total = [], 0
    for block in order.blocks(sizes):
        rows.append(block)
        total += len(block)
        if total >= len(labels):
            break
    shard, number = np.concatenate(rows).T
    read = written_as[shard + shards * number]
    np.testing.assert_array_equal(np.sort(read), np.arange(len(labels)))
    found = mixing(labels[read])
    draws = map(np.random.default_rng, range(1, 6))
    uniform = np.array([mixing(draw.permutation(labels)) for draw in draws])
    # Four times what five uniform shuffles differ by.
    spread = 4 * np.maximum(uniform.std(0), [0.05, 0.1, 0.01, 0.0005])
    above = found - uniform.mean(0)
    if written == "sorted":  # each shard has all classes: more even than at random
        assert (above > -spread).all()
        assert (above[2:] < spread[2:]).all()
    else:
        assert (abs(above) < spread).all()


def test_a_dataset_smaller_than_the_batch_repeats(tmp_path):
    for examples in (2, 5):  # of 8 shards, some of which are empty
        folder = tmp_path / str(examples)
        write_dataset(folder, examples=examples)
        index = take(folder, 3, batch_size=16)["index"]
        assert np.ptp(np.bincount(index.ravel(), minlength=examples)) <= 1


def test_a_split_that_is_not_there(dataset):
    with one_line(match="no split 'test'"):
        take(dataset, 1, split="test")


def test_an_image_is_decoded_only_when_asked_for(tmp_path):
    folder = tmp_path / "latents"
    info = write_dataset(folder, image=b"not a PNG")
    dataclasses.replace(info, images=True).write(folder)
    assert take(folder, 1)["index"].size == BATCH
    with one_line(match="cannot be read"):
        take(folder, 1, fields=("image",))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "cut":
        del data[-10:]
    elif how == "junk":
        data += b"extra"
    path.write_bytes(data)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            "flip",
            r"\S*00005-of-00008 cannot be read \(.* record 6 has another checksum\)",
        ),
        ("cut", "shard latents-train.tfrecord-00005-of-00008 has .* bytes"),
        ("junk", "shard .* has .* bytes"),
        ("missing", "shard .* has no bytes"),
        (
            "schema",
            r"latents-\S* cannot be read \(.* record \d+ has mean not of \(3, 3, 1\)",
        ),
    ],
)
def test_damage_is_one_line(tmp_path, how, match):
    folder = tmp_path / "latents"
    info = write_dataset(folder)
    damage(folder / "latents-train.tfrecord-00005-of-00008", how)
    if how == "schema":
        dataclasses.replace(info, latent_shape=(3, 3, 1)).write(folder)
    with one_line(match=f"^{folder}: {match}"):
        take(folder, 20)


# Prefetching


def sharding():
    devices = jax.local_devices()
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))


def numbered(count):
    for i in range(count):
        yield {"x": np.full((8, 2), i), "label": np.full(8, i)}


def prefetching():
    """Whether a thread is still there after a moment."""
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch_to_device"):
            thread.join(5)
            return thread.is_alive()
    return False


def test_prefetch_yields_all_in_order():
    wanted = sharding()
    with closing(prefetch_to_device(numbered(20), wanted)) as placed:
        rows = list(placed)
    assert [int(row["x"][0, 0]) for row in rows] == list(range(20))
    assert rows[0]["x"].sharding == wanted
    assert rows[0]["label"].shape == (8,)
    assert not prefetching()


def test_prefetch_raises_what_the_iterator_raised():
    def failing():
        yield from numbered(3)
        raise UserError("shard 7 is damaged")

    with closing(prefetch_to_device(failing(), sharding())) as placed:
        assert len(list(itertools.islice(placed, 3))) == 3
        with pytest.raises(UserError, match="shard 7"):
            next(placed)
        with pytest.raises(StopIteration):
            next(placed)
    assert not prefetching()


def test_prefetch_stops_when_left():
    endless = (batch for _ in itertools.count() for batch in numbered(1))
    with closing(prefetch_to_device(endless, sharding())) as placed:
        next(placed)
    assert not prefetching()


def test_no_tensorflow_at_import_and_no_thread_left_at_exit():
    program = """
import itertools, sys
import jax, numpy as np
from sra2_jax.programs import verify
from sra2_jax.data import encode, images, import_latents, pipeline, records
from sra2_jax import generator
from sra2_jax.report import page as report
from sra2_jax import step
assert "tensorflow" not in sys.modules
endless = ({"x": np.zeros((8, 2))} for _ in itertools.count())
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
placed = pipeline.prefetch_to_device(endless, sharding)
next(placed)
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
