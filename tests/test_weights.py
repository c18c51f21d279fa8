"""Folders of weights, read and written in the libraries' formats, for each network."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sra2_jax.weights import dinov2, files, vae
from tests.conftest import one_line

TENSORS = {
    "vae": "decoder.conv_in.weight",
    "dinov2": "encoder.layer.1.mlp.fc1.weight",
}


@pytest.fixture(params=TENSORS)
def kind(request, golden):
    """What loads and saves a network, with its golden folder."""
    name = request.param
    form = {"vae": vae.FORMAT, "dinov2": dinov2.FORMAT}[name]
    return SimpleNamespace(
        load=form.load, save=form.save, file=form.weights, folder=golden / name,
        tensor=TENSORS[name],
    )  # fmt: skip


@pytest.fixture
def folder(kind, tmp_path):
    """A writable copy of the golden folder."""
    return shutil.copytree(kind.folder, tmp_path / "folder")


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def edit_config(folder, **changes):
    """Changes keys of a folder's config.json; None removes one."""
    path = folder / files.CONFIG
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def shard(folder, file, tensors):
    """Split weights in two files and an index, as the libraries do; names the last."""
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        name = file.replace(".safetensors", f"-{i:05d}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / file).unlink()
    index = folder / (file + files.INDEX)
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder / name, index


def refused(load, source, *words):
    """It must fail with one line that holds all the words."""
    with one_line(*words):
        load(str(source))


def test_saved_files_equal_those_of_the_library(kind, tmp_path):
    module, params = kind.load(str(kind.folder))
    kind.save(tmp_path, module.config, params)
    ours, theirs = (load_file(at / kind.file) for at in (tmp_path, kind.folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    ours, theirs = (
        json.loads((at / files.CONFIG).read_text()) for at in (tmp_path, kind.folder)
    )
    theirs = {k: theirs[k] or 0.0 for k in ours}  # of the rest libraries have defaults
    assert ours == theirs


def test_shards_are_read_and_saving_over_them_wins(kind, folder):
    """In half the precision, which is stored and comes back as float32."""
    module, params = kind.load(str(folder))
    lost, index = shard(folder, kind.file, load_file(folder / kind.file))
    assert_same_tree(kind.load(str(folder))[1], params)
    half = jax.tree.map(lambda leaf: (leaf / 2).astype(jnp.bfloat16), params)
    kind.save(folder, module.config, half)
    stored = load_file(folder / kind.file)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(jnp.bfloat16)}
    wanted = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    assert_same_tree(kind.load(str(folder))[1], wanted)

    shard(folder, kind.file, load_file(folder / kind.file))
    lost.unlink()
    refused(kind.load, folder, str(lost), "no such file")
    shutil.copy(kind.folder / kind.file, folder.parent / "a.safetensors")
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    refused(kind.load, folder, str(folder / "a.safetensors"), "no such file")
    for content in ("{}", "[]", '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        refused(kind.load, folder, str(index))


def test_hub_id_is_downloaded(kind, monkeypatch):
    asked = {}

    def snapshot_download(repo, **arguments):
        asked.update(repo=repo, **arguments)
        return str(kind.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    kind.load("owner/name@v1.0")
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1.0")
    patterns = asked["allow_patterns"]
    assert {files.CONFIG, kind.file, kind.file + files.INDEX} < set(patterns)
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)
    kind.load("owner/name")
    assert asked["revision"] is None

    def unreachable(repo, **arguments):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused(kind.load, "owner/name", "owner/name", "no route to host", "folder")


def test_missing_folder_and_files(kind, folder):
    refused(kind.load, folder / "nowhere", "no such folder", "owner/name", kind.file)
    refused(kind.load, folder / kind.file, kind.file, "no such folder")
    for name, said in ((kind.file, "no such file"), (files.CONFIG, "No such file")):
        (folder / name).unlink()
        refused(kind.load, folder, str(folder / name), said)


def test_damaged_files(kind, folder):
    path = folder / kind.file
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n" * 3
    for content in (b"", whole[:4], whole[:1000], whole[:-1], pointer):
        path.write_bytes(content)
        refused(kind.load, folder, str(path), "SafetensorError", "fetch it again")
    path = folder / files.CONFIG
    for data, said in ((b"{", "JSON"), (b"[]", "JSON"), (b"\x80", "utf-8")):
        path.write_bytes(data)
        refused(kind.load, folder, str(path), said)


def test_weights_of_another_network(kind, folder):
    path, name = folder / kind.file, kind.tensor
    tensors = load_file(path)
    shape = str(tensors[name].shape)
    for change, words in (
        ({name: None}, (name, "missing", shape)),
        ({"loss.weight": np.zeros(3, np.float32)}, ("loss.weight", "no such tensor")),
        ({name: tensors[name][:9].copy()}, (name, "(9, ", shape)),
        ({name: tensors[name].astype(bool)}, (name, "bool", shape)),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, path)
        refused(kind.load, folder, str(folder), files.CONFIG, *words, "1 do not fit")
