"""Latents that exist become a dataset, bit for bit in float16."""

import functools
import io
import json
import shutil
import zipfile

import datasets
import numpy as np
import pytest
from safetensors.numpy import save_file

from sra2_jax.data import records
from sra2_jax.data.check import faults
from sra2_jax.data.import_latents import ImportOptions, import_latents
from sra2_jax.errors import UserError
from sra2_jax.weights import load_vae
from tests.conftest import one_line
from tests.hub import COMMIT, hub
from tests.test_data_build import contents
from tests.test_pipeline import read_all

N, SIDE, CHANNELS, PIXELS = 21, 4, 4, 32  # the digits' VAE
LABELS = np.arange(N) * 7 % 10
LOADED = functools.cache(load_vae)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr("sra2_jax.data.import_latents.load_vae", LOADED)


@pytest.fixture
def moments():
    """Mean and deviation, channels first; numbers that float16 holds."""
    draw = np.random.default_rng(0)
    mean = draw.normal(size=(N, CHANNELS, SIDE, SIDE))
    std = draw.uniform(0.01, 1, size=mean.shape)
    joined = np.concatenate([mean, std], 1)
    return joined.astype(np.float16).astype(np.float32)


def run(source, out, **changes):
    names = {"source": str(source), "out": str(out), "vae": "digits"}
    return import_latents(ImportOptions(**names, resolution=PIXELS, **changes))


def write_folder(folder, moments, names=None):
    """As REPA's preprocessing leaves it; the listing in another order."""
    names = names or [f"{i % 2:05d}/img-mean-std-{i:08d}.npy" for i in range(N)]
    for name, array in zip(names, moments, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, array)
    rows = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows[::-1]}))
    return np.argsort(names)


def check(out, info, moments, labels):
    """Of latents alone the deviation is 0."""
    assert info == records.LatentsInfo.read(out)
    assert (info.num_examples, info.num_classes) == (len(labels), 10)
    assert faults(out, info) == []
    rows = read_all(out)
    assert set(rows) == set(range(len(labels)))
    parts = moments.shape[1] // CHANNELS
    for index, row in rows.items():
        found = moments[index].reshape(parts, CHANNELS, SIDE, SIDE)
        mean, *std = np.moveaxis(found, 1, -1)
        assert row["mean"].dtype == np.float16
        np.testing.assert_array_equal(row["mean"], mean)
        np.testing.assert_array_equal(row["std"], std[0] if std else 0)
        assert row["label"] == labels[index]
    return rows


def test_folder_of_repa(tmp_path, moments):
    order = write_folder(tmp_path / "data" / "vae-sd", moments)
    info = run(tmp_path / "data", tmp_path / "a")
    check(tmp_path / "a", info, moments[order], LABELS[order])
    run(tmp_path / "data" / "vae-sd", tmp_path / "b")
    same = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert all(same[0][n] == same[1][n] for n in same[0] if "tfrecord" in n)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "a", "b"}
    shutil.make_archive(tmp_path / "zipped", "zip", tmp_path / "data")
    info = run(tmp_path / "zipped.zip", tmp_path / "c")
    check(tmp_path / "c", info, moments[order], LABELS[order])


def test_lightningdit(tmp_path, moments):
    """Drawn latents and those of mirrored images, in two files; their statistics by
    channel from upstream's kind of file, or computed over all."""
    latents = np.concatenate(np.split(moments, 2, axis=1))
    for i, part in enumerate(np.split(np.arange(N), [8])):
        tensors = {"latents": latents[:N][part], "latents_flip": latents[N:][part]}
        path = tmp_path / "in" / f"latents_rank00_shard{i:03d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors | {"labels": LABELS[part]}, path)
    over = {"axis": (0, 2, 3), "keepdims": True}
    stats = {"mean": latents.mean(**over), "std": latents.std(**over)}
    np.savez(tmp_path / "stats.npz", **stats)
    read = run(tmp_path / "in", tmp_path / "a", statistics=f"{tmp_path}/stats.npz")
    found = run(tmp_path / "in", tmp_path / "b", statistics="computed")
    for out, info in (("a", read), ("b", found)):
        assert (info.mirror_offset, info.scaling_factor) == (N, 1)
        check(tmp_path / out, info, latents, np.tile(LABELS, 2))
        for name, x in stats.items():
            stored = np.array(getattr(info, f"channel_{name}"))
            np.testing.assert_allclose(stored, x.ravel(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(info.latent_std, 1, rtol=1e-4)
    np.savez(tmp_path / "stats.npz", mean=np.ones(3), std=np.ones(3))
    with one_line("mean and std of 4 channels are wanted"):
        run(tmp_path / "in", tmp_path / "c", statistics=f"{tmp_path}/stats.npz")


FEATURES = {"data": datasets.Array3D((2 * CHANNELS, SIDE, SIDE), "float32")}
LABELLED = {"label": datasets.ClassLabel(10)}


def saved(folder, moments, kind):
    """What `datasets` leaves, and the flags that read it."""
    rows = {"data": list(moments), "label": LABELS}
    features = datasets.Features(FEATURES | LABELLED)
    if kind == "arrow":  # as iREPA's, labels in a file of their own
        rows.pop("label")
        features = datasets.Features(FEATURES)
        table = datasets.Dataset.from_dict(rows, features)
        table.save_to_disk(folder / "sub", num_shards=2)
        (folder / "labels.txt").write_text("".join(f"{n}\n" for n in LABELS))
        return {"inside": "sub", "labels": "labels.txt"}
    if kind == "nested":  # lists of lists, with an axis more
        rows = {"moments": moments[:, None].tolist(), "labels": LABELS}
        table = datasets.Dataset.from_dict(rows)
        both = {"train": table, "val": table.select(range(3))}
        datasets.DatasetDict(both).save_to_disk(folder)
        return {}
    rows["mean"], rows["std"] = np.split(np.moveaxis(rows.pop("data"), 1, -1), 2, -1)
    table = datasets.Dataset.from_dict({k: list(v) for k, v in rows.items()})
    for name, part in (("train", table), ("val", table.select(range(3)))):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "data" / f"{name}-00000-of-00001.parquet"
        part.to_parquet(path, batch_size=4)
    return {"channels": "last", "shards": 3}


@pytest.mark.parametrize("kind", ["arrow", "nested", "parquet"])
def test_tables_of_hugging_face(tmp_path, moments, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.TF_AVAILABLE", False)
    flags = saved(tmp_path / "in", moments, kind)
    check(
        tmp_path / "a", run(tmp_path / "in", tmp_path / "a", **flags), moments, LABELS
    )
    if kind == "arrow":
        (tmp_path / "in" / "labels.txt").write_text("1\n2\n")
        with one_line(f"labels int64 (2,) for {N} latents"):
            run(tmp_path / "in", tmp_path / "b", **flags)
        with one_line("needs labels (or --labels)"):
            run(tmp_path / "in", tmp_path / "b", inside="sub")
    if kind == "parquet":
        with one_line("it has the splits ['train', 'val']: --split"):
            run(tmp_path / "in", tmp_path / "b", split="test")


@pytest.mark.parametrize(
    ("last", "split", "archive"),
    [(False, False, True), (True, False, False), (False, True, False), (True,) * 3],
)
def test_arrays(tmp_path, moments, last, split, archive):
    stored = np.moveaxis(moments, 1, -1) if last else moments
    arrays = {"moments": stored, "labels": LABELS}
    if split:
        mean, std = np.split(stored, 2, axis=-1 if last else 1)
        arrays = {"mean": mean, "std": np.asfortranarray(std), "labels": LABELS}
    source = tmp_path / ("latents.npz" if archive else "arrays")
    if archive:
        np.savez(source, **arrays)
    else:
        source.mkdir()
        for name, array in arrays.items():
            np.save(source / f"{name}.npy", array.astype(">f8") if last else array)
        np.save(source / "labels.npy", LABELS)
    flags = {}
    if split:  # 4 x 4 x 4: nobody can tell
        with pytest.raises(UserError, match="give --channels=first or last"):
            run(source, tmp_path / "out")
        flags = {"channels": "last" if last else "first"}
    info = run(source, tmp_path / "out", **flags)
    check(tmp_path / "out", info, moments, LABELS)


def test_logarithms_of_the_variance(tmp_path, moments):
    changed = moments.copy()
    changed[:, CHANNELS:] = 2 * np.log(moments[:, CHANNELS:])
    np.savez(tmp_path / "x.npz", moments=changed, labels=LABELS)
    with pytest.raises(UserError, match=r"negative deviations.*--logvar"):
        run(tmp_path / "x.npz", tmp_path / "a")
    run(tmp_path / "x.npz", tmp_path / "a", logvar=True)
    rows = read_all(tmp_path / "a")
    for index, row in rows.items():
        wanted = np.moveaxis(moments[index, CHANNELS:], 0, -1)
        np.testing.assert_allclose(row["std"], wanted, rtol=2e-3)


@pytest.mark.parametrize(
    "rows",
    [
        *("{", "[]", '{"labels": null}', '{"labels": []}', '{"labels": [null]}'),
        *([["a.npy", 0.5]], [["a.npy", True]], [[3, 0]]),
        [["a.npy", 0], ["a.npy", 1]],
        *([["../x.npy", 0]], [["/etc/x.npy", 0]], [["a/../../x.npy", 0]]),
        [["x.txt", 0]],
    ],
)
def test_listings_that_are_none(tmp_path, rows):
    text = rows if isinstance(rows, str) else json.dumps({"labels": rows})
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="cannot be imported"):
        run(tmp_path, tmp_path / "out")


def npy(array, **flags):
    data = io.BytesIO()
    np.save(data, array, **flags)
    return data.getvalue()


def archive_of(labels=LABELS, **members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in {"labels": npy(labels), **members}.items():
            archive.writestr(f"{name}.npy", content)
    return data.getvalue()


OBJECTS = npy(np.array([{}, None]), allow_pickle=True)
ONES = npy(np.ones((N, 8, 4, 4)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"PK", "cannot be imported"),
        (archive_of(moments=OBJECTS), "allow_pickle=False"),
        (archive_of(moments=ONES[:-8]), "cannot be imported"),
        (archive_of(), "needs labels .*, and moments, latents, or mean and std"),
        (archive_of(moments=npy(np.ones(3))), r"\(21,\) for 3 latents"),
        (
            archive_of(moments=npy(np.ones((N, 8, 4, 5)))),
            r"latent 0: .*float64 \(8, 4, 5\), not",
        ),
        (
            archive_of(moments=npy(np.full((N, 8, 4, 4), 1e5))),
            "mean of image 0 is not finite or too large for float16",
        ),
        (archive_of(LABELS - 1, moments=ONES), r"labels are not in \[0, 9\)"),
    ],
)
def test_archives_that_are_refused(tmp_path, content, match):
    (tmp_path / "x.npz").write_bytes(content)
    with one_line(match=match):
        run(tmp_path / "x.npz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_damaged_archive_and_a_compressed_one(tmp_path, moments):
    np.savez(tmp_path / "x.npz", moments=moments, labels=LABELS)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[2000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"Bad CRC-32 for file 'moments\.npy'"):
        run(tmp_path / "x.npz", tmp_path / "out")
    np.savez_compressed(tmp_path / "y.npz", moments=moments, labels=LABELS)
    check(tmp_path / "out", run(tmp_path / "y.npz", tmp_path / "out"), moments, LABELS)


@pytest.mark.parametrize("content", [b"text", OBJECTS, archive_of()])
def test_files_that_are_no_arrays(tmp_path, moments, content):
    write_folder(tmp_path / "in", moments)
    bad = tmp_path / "in" / "00001" / "img-mean-std-00000003.npy"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=f"{bad.name}: cannot be imported"):
        run(tmp_path / "in", tmp_path / "out")


def test_from_the_hub(tmp_path, moments, monkeypatch):
    """The hub's own client fetches a folder and the labels beside it, no more; the
    dataset names the commit."""
    monkeypatch.setattr("datasets.config.TF_AVAILABLE", False)
    flags = saved(tmp_path / "repo", moments, "arrow")
    (tmp_path / "repo" / "large.bin").write_bytes(b"not wanted")
    found = [path for path in (tmp_path / "repo").rglob("*") if path.is_file()]
    files = {str(p.relative_to(tmp_path / "repo")): p.read_bytes() for p in found}
    # a repository of a model, not of a dataset
    with hub(monkeypatch, tmp_path / "cache", **{"owner/latents": files}):
        info = run("owner/latents@v1", tmp_path / "a", **flags)
        with one_line("owner/other: not from the hub"):
            run("owner/other", tmp_path / "b", **flags)
    check(tmp_path / "a", info, moments, LABELS)
    assert info.options["imported"] == f"owner/latents@{COMMIT}/sub"
    assert not [*(tmp_path / "cache").rglob("large.bin")]
