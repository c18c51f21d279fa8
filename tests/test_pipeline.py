"""The schema of a latents dataset and the order of the batches read from it."""

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sra2_jax.data.shards import ShardWriter
from sra2_jax.data.tfds_metadata import write_tfds_metadata

from sra2_jax.data import pipeline, prefetch, records
from sra2_jax.errors import UserError

EXAMPLES, SHARDS, STREAMS, BATCH = 103, 8, 4, 8


def write_dataset(folder, examples=EXAMPLES, label=lambda index: index % 10, **extra):
    """A dataset of (2, 2, 1) latents that hold their own index; `extra` in each."""
    folder.mkdir()
    with ShardWriter(folder, "train", SHARDS) as writer:
        for index in range(examples):
            latent = np.full((2, 2, 1), index, np.float16)
            writer.write(latent, latent / 2, label(index), index, **extra)
    info = records.LatentsInfo(
        vae="vae",
        scaling_factor=0.18215,
        shift_factor=0.0,
        resolution=16,
        latent_shape=(2, 2, 1),
        num_examples=examples,
        num_classes=10,
        class_names=(),
        splits={"train": writer.shards()},
        latent_mean=(0.0,),
        latent_std=(1.0,),
        crop=records.CROP,
        versions={},
    )
    info.write(folder)
    return info


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "latents"
    write_dataset(folder)
    return folder


ARGUMENTS = {
    "split": "train",
    "batch_size": BATCH,
    "seed": 0,
    "start_step": 0,
    "streams": STREAMS,
    "shuffle_buffer": 40,
    "process_index": 0,
    "process_count": 1,
}


def take(folder, steps, **changes):
    """`steps` batches, stacked by key."""
    iterator = pipeline.batches(folder, **(ARGUMENTS | changes))
    rows = list(itertools.islice(iterator, steps))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def read_with_tfds(folder):
    records.tensorflow()
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    rows = tfds.as_numpy(builder.as_dataset(split="train"))
    return builder.info, {int(row["index"]): row for row in rows}


# Schema


def test_float16_survives_exactly(tmp_path):
    folder = tmp_path / "latents"
    info = write_dataset(folder)
    write_tfds_metadata(folder, info)
    tfds_info, rows = read_with_tfds(folder)
    assert tfds_info.features["label"].num_classes == 10
    assert set(rows) == set(range(EXAMPLES))
    for index, row in rows.items():
        latent = np.full((2, 2, 1), index, np.float16)
        assert row["mean"].dtype == row["std"].dtype == np.float16
        np.testing.assert_array_equal(row["mean"], latent)
        np.testing.assert_array_equal(row["std"], latent / 2)
        assert row["label"] == index % 10


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"format": 2}'])
def test_missing_or_garbled_description(tmp_path, text):
    if text is not None:
        (tmp_path / records.FILE).write_text(text)
    with pytest.raises(UserError, match=r"sra2_jax\.data\.encode") as error:
        records.LatentsInfo.read(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("latent_shape", [2, 2]), ("num_examples", 5), ("splits", {"train": {}})],
)
def test_description_that_contradicts_itself(tmp_path, key, value):
    write_dataset(tmp_path / "latents")
    path = tmp_path / "latents" / records.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="does not describe"):
        records.LatentsInfo.read(path.parent)


def test_description_without_the_newer_keys(dataset, tmp_path):
    path = dataset / records.FILE
    fields = json.loads(path.read_text())
    del fields["images"], fields["features"]
    (tmp_path / records.FILE).write_text(json.dumps(fields))
    assert records.LatentsInfo.read(tmp_path) == records.LatentsInfo.read(dataset)


def test_check_names_every_contradiction(dataset):
    info = records.LatentsInfo.read(dataset)
    good = {
        "folder": dataset,
        "resolution": 16,
        "latent_shape": (2, 2, 1),
        "num_classes": 10,
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
        "vae": "vae",
    }
    records.check(info, **good)
    bad = {
        "resolution": 256,
        "latent_shape": (32, 32, 4),
        "num_classes": 1000,
        "scaling_factor": 1.0,
        "shift_factor": 0.5,
        "vae": "other",
    }
    with pytest.raises(UserError) as error:
        records.check(info, **(good | bad))
    message = str(error.value)
    for part in (
        "data.resolution=256, dataset was encoded with 16:",
        "latents.size=32, dataset was encoded with 2:",
        "latents.channels=4, dataset was encoded with 1:",
        "data.num_classes=1000, dataset was encoded with 10:",
        "latents.scaling_factor=1.0, dataset was encoded with 0.18215:",
        "latents.shift_factor=0.5, dataset was encoded with 0.0:",
        "vae=other, dataset was encoded with vae:",
        str(dataset),
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(UserError) as error:
        records.check(info, **(good | {"num_classes": 11}))
    assert "latents.size" not in str(error.value)


def test_check_compares_features(dataset):
    stored = records.Features("digits", grid=1, width=64)
    plain = records.LatentsInfo.read(dataset)
    info = dataclasses.replace(plain, features=stored)
    good = {
        "folder": dataset,
        "resolution": 16,
        "latent_shape": (2, 2, 1),
        "num_classes": 10,
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
    }
    records.check(info, **good)
    records.check(info, **good, features=stored)
    wanted = records.Features("other", grid=2, width=768)
    with pytest.raises(UserError) as error:
        records.check(info, **good, features=wanted)
    for part in (
        "align.encoder.model=other, dataset was encoded with digits:",
        "align.encoder.width=768, dataset was encoded with 64:",
        "model.patch_size=1, dataset was encoded with 2:",
        "encode again with --grid",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"encoded with none: .* --encoder ") as error:
        records.check(plain, **good, features=wanted)
    assert str(error.value).count("config says") == 1


# Order of the batches


def test_order_does_not_depend_on_processes(dataset):
    whole = take(dataset, 30)
    for count in (2, 4):
        parts = [
            take(dataset, 30, process_index=i, process_count=count)
            for i in range(count)
        ]
        for key, value in whole.items():
            joined = np.concatenate([part[key] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, value)
    assert [(whole[k].dtype.name) for k in ("mean", "std", "label", "index")] == [
        "float16",
        "float16",
        "int32",
        "int64",
    ]
    np.testing.assert_array_equal(whole["mean"][..., 0, 0, 0], whole["index"])
    np.testing.assert_array_equal(whole["label"], whole["index"] % 10)


# A stream holds 25 to 27 records and 2 rows of a batch: an epoch is about 13 steps.
def test_resume_continues_exactly(dataset):
    whole = take(dataset, 70)
    for start in (1, 12, 13, 14, 39, 57):
        tail = take(dataset, 70 - start, start_step=start)
        for key, value in whole.items():
            np.testing.assert_array_equal(tail[key], value[start:])


@pytest.mark.parametrize("shuffle_buffer", [1, 40, 1000])
def test_an_epoch_visits_each_record_once(dataset, shuffle_buffer):
    rows = BATCH // STREAMS
    index = take(dataset, 45, shuffle_buffer=shuffle_buffer)["index"]
    for v in range(STREAMS):
        own = {i for i in range(EXAMPLES) if i % SHARDS % STREAMS == v}
        stream = index[:, v * rows : (v + 1) * rows].ravel()
        epochs = [stream[e * len(own) : (e + 1) * len(own)] for e in range(3)]
        for epoch in epochs:
            assert set(epoch) == own
        # Without a buffer only the order of its two files could differ.
        if shuffle_buffer > 1:
            assert not np.array_equal(epochs[0], epochs[1])
            assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_seeds_differ_and_repeat(dataset):
    first, again, other = (take(dataset, 5, seed=s)["index"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_dataset_smaller_than_the_batch_repeats(tmp_path):
    write_dataset(tmp_path / "latents", examples=5)
    index = take(tmp_path / "latents", 3, batch_size=16)["index"]
    assert set(index.ravel()) == set(range(5))
    write_dataset(tmp_path / "fewer", examples=2)
    with pytest.raises(UserError, match="no records"):
        take(tmp_path / "fewer", 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 10}, "not a multiple of the 4 data streams"),
        ({"process_count": 3}, "do not divide among 3 processes"),
        ({"streams": 16, "batch_size": 16}, "--shards=16"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_numbers_that_do_not_fit(dataset, changes, match):
    with pytest.raises(UserError, match=match):
        take(dataset, 1, **changes)


@pytest.mark.parametrize(
    ("field", "flag"), [("image", "--store_images"), ("features", "--encoder")]
)
def test_a_field_that_is_not_stored(dataset, field, flag):
    with pytest.raises(UserError, match=f"no {field}.*{flag}") as error:
        take(dataset, 1, fields=(field,))
    assert str(error.value).startswith(f"{dataset}: ")
    assert "\n" not in str(error.value)


def test_an_image_is_decoded_only_when_asked_for(tmp_path):
    folder = tmp_path / "latents"
    info = write_dataset(folder, image=b"not a PNG")
    dataclasses.replace(info, images=True).write(folder)
    assert take(folder, 1)["index"].size == BATCH
    with pytest.raises(UserError, match="cannot be read") as error:
        take(folder, 1, fields=("image",))
    assert "\n" not in str(error.value)


def test_label_out_of_range(tmp_path):
    folder = tmp_path / "latents"
    write_dataset(folder, label=lambda index: 10 if index == 57 else 0)
    with pytest.raises(
        UserError, match=r"index 57 in shard .*-00001-of-00008 has"
    ) as error:
        take(folder, 20)
    assert str(folder) in str(error.value)


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
    ("how", "where"),
    [
        ("flip", r"{}: record 6 is damaged \(corrupted record at \d+"),
        ("cut", "{} has .* bytes"),
        ("junk", "{} has .* bytes"),
        ("missing", "{} has no bytes"),
    ],
)
def test_damaged_shard_and_record_are_named(tmp_path, how, where):
    folder = tmp_path / "latents"
    write_dataset(folder)
    path = folder / "latents-train.tfrecord-00005-of-00008"
    damage(path, how)
    with pytest.raises(UserError, match=where.format(path.name)) as error:
        take(folder, 20)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def swap(folder, shard, other):
    """Replace a shard by a copy of another one of the same size."""
    paths = [
        folder / f"latents-train.tfrecord-{s:05d}-of-00008" for s in (shard, other)
    ]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    copy = folder / "copy"
    copy.write_bytes(paths[1].read_bytes())
    copy.replace(paths[0])  # who reads the old file goes on with it


@pytest.mark.parametrize("other", [1, 3])  # of the same stream, of another one
def test_a_copy_of_another_shard_is_refused_at_the_start(tmp_path, other):
    folder = tmp_path / "latents"
    write_dataset(folder)
    swap(folder, 5, other)
    with pytest.raises(UserError, match=f"00005-of-.* belongs in .*0000{other}-of-"):
        take(folder, 0)


def test_a_shard_replaced_while_training_is_noticed(tmp_path):
    folder = tmp_path / "latents"
    write_dataset(folder)
    rows = pipeline.batches(folder, **ARGUMENTS)
    next(rows)
    for shard in range(7):  # the last one is shorter
        swap(folder, shard, 0)
    with pytest.raises(UserError, match=r"in the shards of stream [123] and belongs"):
        list(itertools.islice(rows, 200))


def test_a_shard_with_too_few_records_is_named(tmp_path):
    folder = tmp_path / "latents"
    info = write_dataset(folder)
    shards = info.splits["train"]
    claimed = dataclasses.replace(
        shards, records=(shards.records[0] + 1, *shards.records[1:])
    )
    dataclasses.replace(
        info, num_examples=EXAMPLES + 1, splits={"train": claimed}
    ).write(folder)
    with pytest.raises(UserError, match="has 13 records, not 14"):
        take(folder, 20)


def test_another_schema_is_an_error(tmp_path):
    folder = tmp_path / "latents"
    info = write_dataset(folder)
    dataclasses.replace(info, latent_shape=(3, 3, 1)).write(folder)
    with pytest.raises(UserError, match=r"00000-of-00008: record 0 cannot be parsed"):
        take(folder, 1)


# Prefetching


def sharding():
    devices = jax.local_devices()
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))


def numbered(count):
    for i in range(count):
        yield {"x": np.full((8, 2), i), "label": np.full(8, i)}


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch_to_device"]


def test_prefetch_yields_all_in_order():
    wanted = sharding()
    with prefetch.prefetch_to_device(numbered(20), wanted) as placed:
        rows = list(placed)
    assert [int(row["x"][0, 0]) for row in rows] == list(range(20))
    assert rows[0]["x"].sharding == wanted
    assert rows[0]["label"].shape == (8,)
    assert not prefetch_threads()


def test_prefetch_raises_what_the_iterator_raised():
    def failing():
        yield from numbered(3)
        raise UserError("shard 7 is damaged")

    placed = prefetch.prefetch_to_device(failing(), sharding())
    assert len(list(itertools.islice(placed, 3))) == 3
    with pytest.raises(UserError, match="shard 7"):
        next(placed)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(placed)


def test_prefetch_stops_when_closed_or_forgotten():
    endless = (batch for _ in itertools.count() for batch in numbered(1))
    with prefetch.prefetch_to_device(endless, sharding()) as placed:
        next(placed)
    assert not prefetch_threads()
    forgotten = prefetch.prefetch_to_device(numbered(10), sharding())
    next(forgotten)
    del forgotten
    assert not prefetch_threads()


def test_no_tensorflow_at_import_and_no_thread_left_at_exit():
    program = """
import itertools, sys
import jax, numpy as np
from sra2_jax.programs import verify
from sra2_jax.data import encode, images, pipeline, prefetch, records
from sra2_jax import generate
from sra2_jax.report import page as report
from sra2_jax import step
assert "tensorflow" not in sys.modules
endless = ({"x": np.zeros((8, 2))} for _ in itertools.count())
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
placed = prefetch.prefetch_to_device(endless, sharding)
next(placed)
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
