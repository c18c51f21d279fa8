"""Nothing that is read can run code, fill the memory or leave its folder."""

import io
import json
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from safetensors.numpy import save_file

from sra2_jax.config import Config
from sra2_jax.data.images import open_source, readable
from sra2_jax.data.records import check_split
from sra2_jax.errors import UserError
from sra2_jax.metrics.sets import open_images
from sra2_jax.models.dinov2 import DINOv2Config
from sra2_jax.models.vae import VAEConfig
from sra2_jax.storage import read_json
from sra2_jax.weights import files, load_dinov2, load_vae
from sra2_jax.weights.files import read_file
from tests.conftest import one_line

ROOT = Path(__file__).parents[1]


def test_no_pickle_is_read():
    """What ruff's rules on safety (pyproject.toml) do not find."""
    sources = [*(ROOT / "sra2_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert len(sources) > 80
    for path in sources:
        text = path.read_text()
        assert not re.search("allow_pickle=(?!False)|weights_only=(?!True)", text), path


def member(header, data=b"\0" * 48):
    """A .npy with any header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + data


def npz(path, members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def header(dtype="<f4", shape="(12,)"):
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}\n"


def refused(read, path):
    """The one line that it is refused with."""
    with one_line(str(path)) as error:
        read(path)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        header("|O"), header([("a", "O")]), header(shape="(1000000000000,)"),
        header(shape="(-1,)"), header(shape="(" * 200 + ")" * 200),
        "__import__('os').system('false')", "{" * 9000, "",
    ],
)  # fmt: skip
def test_npz_headers(text, tmp_path):
    path = npz(tmp_path / "a.npz", {"a.npy": member(text)})
    refused(read_file, path)


def test_names_of_members_make_no_files(tmp_path):
    paths = [
        npz(tmp_path / f"{i}.npz", {name: member(header()) for name in names})
        for i, names in enumerate(
            (
                ("../../out.npy", "/tmp/out_of_an_archive.npy"),
                ("model.../../x.npy", "model./tmp/out_of_an_archive.npy"),
            )
        )
    ]
    before = set(tmp_path.parent.rglob("*"))
    for path in paths:
        assert len(read_file(path).sets) == 1
    assert set(tmp_path.parent.rglob("*")) == before
    assert not Path("/tmp/out_of_an_archive.npy").exists()


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "", "..", "a\nb"])
def test_names_cannot_leave_their_folder(name, tiny, tmp_path):
    """Of runs, of splits, of shards of weights, of revisions on the hub."""
    tiny.name = name
    with pytest.raises(UserError, match=r"config\.name="):
        Config.of(tiny)
    with pytest.raises(ValueError, match="no name of letters"):
        check_split(name)
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    index = tmp_path / "w.safetensors.index.json"
    (tmp_path / "index.json").rename(index)
    with pytest.raises(UserError):
        files.read_weights(tmp_path, "w.safetensors")
    if name.strip("."):
        with pytest.raises(UserError, match="not a hub id either"):
            files.fetch(f"owner/name@{name}", "w.safetensors")


@pytest.mark.parametrize(
    ("load", "folder", "kind"),
    [
        (load_vae, "digits_vae", VAEConfig),
        (load_dinov2, "digits_dinov2", DINOv2Config),
    ],
)
def test_absurd_numbers_in_a_models_config(load, folder, kind, tmp_path):
    """They would take hours or all memory before the weights are looked at."""
    fields = json.loads((files.ASSETS / folder / "config.json").read_text())
    config = tmp_path / "config.json"
    numbers = [k for k, v in get_type_hints(kind).items() if v in (int, float)]
    assert len(numbers) >= 6
    for key in numbers:
        for value in (10**9, 10**40, float("nan")):
            config.write_text(json.dumps(fields | {key: value}))
            assert key in refused(load, tmp_path)
    if load is load_vae:
        for value in (7, [10**9] * 4, [None]):
            config.write_text(json.dumps(fields | {"block_out_channels": value}))
            refused(load, tmp_path)
    for text in ("[" * 100_000, "9" * 10_000):
        config.write_text(text)
        refused(load, tmp_path)


def mutated(draw, data):
    """A file with one of the faults that files have."""
    data, at = bytearray(data), draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at : at + 8] = draw.choice([b"\0", b"\xff"]) * 8
        case 3:
            del data[at : at + draw.randrange(1, 20)]
        case 4:
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58] or [at]
            at = draw.choice(digits)
            wild = (b"-1", b"1e9", b"null", b"[1]", b"{}", b"true", b'"x"', b"9" * 20)
            data[at : at + 1] = draw.choice(wild)
    return bytes(data)


def test_damaged_files_are_read_or_refused(tiny, tmp_path):
    """1,000 of them, and no other error."""
    weights = {"a.weight": np.eye(3, dtype=np.float32), "b": np.ones(3, np.float16)}
    images = np.zeros((4, 8, 8, 3), np.uint8)
    readers = {}
    for name, read, arrays in (
        ("w.npz", read_file, weights),
        ("i.npz", open_images, {"arr_0": images, "arr_1": np.arange(4)}),
        ("r.npz", open_images, {"mu": np.zeros(4), "sigma": np.eye(4)}),
    ):
        np.savez(tmp_path / name, **arrays)
        readers[name] = read
    save_file(weights, tmp_path / "w.safetensors", {"step": "3"})
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict()))
    readers["w.safetensors"] = read_file
    readers["config.json"] = lambda path: Config.of(read_json(path))
    draw = random.Random(0)
    for name, read in readers.items():
        whole, refusals = (tmp_path / name).read_bytes(), []
        path = tmp_path / f"damaged_{name}"
        for _ in range(200):
            path.write_bytes(mutated(draw, whole))
            try:
                read(str(path) if "r.npz" in name or "i.npz" in name else path)
            except UserError as error:
                refusals.append(str(error))
        assert len(refusals) > 100, name
        assert not [line for line in refusals if "\n" in line]


def png(side):
    """A PNG that says it has so many pixels a side, in a few bytes."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_image_bombs_are_reported(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "bomb.png").write_bytes(png(60_000))
    Image.new("RGB", (8, 8)).save(tmp_path / "class" / "good.png")
    source = open_source(tmp_path, "train")
    skipped = []
    images = readable(source, 8, 0.9, lambda *row: skipped.append(row) or len(skipped))
    assert len(list(images)) == 1
    ((_, line),) = skipped
    assert line.startswith("class/bomb.png\tDecompressionBombError")
    with pytest.raises(UserError, match=r"bomb\.png: DecompressionBombError"):
        list(readable(source, 8, 0.0, lambda *row: 1))


def test_hub_offline(tmp_path, monkeypatch):
    """What was downloaded is used, at the pinned commit; what was not is refused."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert files.fetch(f"owner/name@{commit}", "w.safetensors") == snapshot
    for source in ("owner/name", f"owner/other@{commit}", f"owner/name@{'1' * 40}"):
        said = refused(lambda name: files.fetch(name, "w.safetensors"), source)
        assert "HF_HUB_OFFLINE, or give a folder" in said
