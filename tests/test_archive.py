"""Image sets and reference files: what is written is read, damage is one line."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from sra2_jax.data.digits import load_digits
from sra2_jax.data.pixels import center_crop
from sra2_jax.errors import UserError
from sra2_jax.metrics.sets import open_images, write_npz
from tests.conftest import one_line

DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (23, 8, 12, 3), dtype=np.uint8)
LABELS = np.arange(23) % 5
MU, SIGMA = np.arange(4.0), np.eye(4)


def refused(path, *words):
    """Opening, or a pass over its images, must fail with a line that names the file."""
    with one_line(path.name, *words):
        list(open_images(str(path)).batches(5))


# Reading


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_labels_and_settings(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, IMAGES, LABELS, settings=np.array('{"seed": 3}'))
    images = open_images(str(path))
    assert (images.name, images.shape) == (str(path), (23, 8, 12, 3))
    assert images.settings == {"seed": 3}
    np.testing.assert_array_equal(images.labels, LABELS)
    for size in (5, 100):
        parts = list(images.batches(size))
        assert len(parts[0]) == min(size, 23)
        np.testing.assert_array_equal(np.concatenate(parts), IMAGES)
    for settings in ("{", "[1]", 3.0):  # no JSON object: ignored
        np.savez(path, IMAGES, settings=np.array(settings))
        images = open_images(str(path))
        assert images.settings is images.labels is None


def test_large_files_are_streamed(tmp_path):
    path, batch = tmp_path / "large.npz", np.zeros((25, 128, 128, 3), np.uint8)
    tracemalloc.start()
    batches = (batch + np.uint8(i) for i in range(32))
    write_npz(path, {}, batches, (800, 128, 128, 3))
    images = open_images(str(path))
    found = [(len(part), int(part[0, 0, 0, 0])) for part in images.batches(25)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(25, i) for i in range(32)]
    assert path.stat().st_size > 39e6
    assert peak < 8e6


def test_folder(tmp_path):
    """Any depth, in the order of the paths; hidden files and other suffixes are not
    images."""
    names = "b/2.PNG", "a/z/1.png", "c.png", ".hidden/x.png", "a/.x.png"
    squares = IMAGES[:, :, :8]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(squares[i]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(str(tmp_path))
    assert (images.shape, images.labels) == ((3, 8, 8, 3), None)
    for _ in range(2):
        parts = list(images.batches(2))
        assert [len(part) for part in parts] == [2, 1]
        np.testing.assert_array_equal(np.concatenate(parts), squares[[1, 0, 2]])
    images = open_images(str(tmp_path), resolution=6)
    assert images.gaussians == {}
    (small,) = images.batches(9)
    np.testing.assert_array_equal(small[1], center_crop(squares[0], 6))


def test_folder_of_mixed_sizes_or_broken_files(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    refused(folder, "no images")
    Image.fromarray(IMAGES[0, :, :8]).save(folder / "a.png")
    Image.fromarray(IMAGES[1]).save(folder / "b.png")
    refused(folder, "not all images have 8x8 pixels", "--resolution")
    assert len(next(open_images(str(folder), 4).batches(2))) == 2
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(b"\x89PNG")
        refused(folder, name, "cannot identify image")


def test_digits():
    pixels, labels = load_digits("test")
    images = open_images("digits", split="test")
    np.testing.assert_array_equal(np.concatenate([*images.batches(100)]), pixels)
    np.testing.assert_array_equal(images.labels, labels)
    assert open_images("digits", 8).shape == (1437, 8, 8, 3)
    with pytest.raises(UserError, match=r"tfds:imagenet2012: .*--resolution"):
        open_images("tfds:imagenet2012")


# References


def test_references(tmp_path):
    path = tmp_path / "reference.npz"
    pool = {"mu": MU, "sigma": SIGMA}
    spatial = {"mu_s": MU[:3], "sigma_s": np.ones((3, 3))}
    np.savez(path, arr_0=IMAGES, **pool, **spatial, settings=np.array('{"count": 9}'))
    reference = open_images(str(path))
    for kind, pair in (("pool", pool), ("spatial", spatial)):
        for ours, value in zip(reference.gaussians[kind], pair.values(), strict=True):
            np.testing.assert_array_equal(ours, value)
    assert reference.settings == {"count": 9}
    (found,) = reference.batches(99)
    np.testing.assert_array_equal(found, IMAGES)
    np.savez(path, mu=MU.astype(np.float32), sigma=SIGMA)
    reference = open_images(str(path))
    assert reference.gaussians["pool"][0].dtype == np.float64
    assert list(reference.gaussians) == ["pool"]
    assert len(reference) == 0


# Damage


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": MU}, ["'sigma is not a file"]),
        ({"sigma": SIGMA, "arr_0": IMAGES}, ["'mu is not a file"]),
        ({"mu": MU, "sigma": SIGMA[:3]}, ["(4,)", "(3, 4)"]),
        ({"mu": MU, "sigma": SIGMA * np.nan}, ["finite"]),
        ({"mu": MU, "sigma": np.tri(4)}, ["symmetric"]),
        ({"mu": MU * 1j, "sigma": SIGMA}, ["complex128"]),
        ({"mu": np.array([None] * 4), "sigma": SIGMA}, ["Object arrays"]),
        ({"images": IMAGES, "y": LABELS}, ["'arr_0.npy'"]),
    ],
)
def test_unusable_files(tmp_path, arrays, words):
    path = tmp_path / "reference.npz"
    refused(path, "No such file", "give one")
    np.savez(path, **arrays)
    refused(path, *words)


@pytest.mark.parametrize(
    "array",
    [
        IMAGES.astype(np.float32) / 255,
        IMAGES.transpose(0, 3, 1, 2).copy(),
        IMAGES[..., :1],
        IMAGES[:0],
        np.asfortranarray(IMAGES),
        np.array([None] * 3),
    ],
)
def test_unusable_images(tmp_path, array):
    path = tmp_path / "samples.npz"
    np.savez(path, array)
    words = str(array.dtype), str(array.shape), "not uint8 (N, H, W, 3) in C"
    refused(path, "arr_0", *words)


def cut_to(share):
    return lambda data: data[: int(share * len(data))]


def flipped(data):
    data = bytearray(data)
    data[len(data) // 2] ^= 8
    return data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "damage", [flipped, *(cut_to(share) for share in (0, 0.3, 0.99))]
)
def test_damaged_files(tmp_path, save, damage):
    path = tmp_path / "samples.npz"
    save(path, IMAGES)
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "no whole .npz")


def test_images_shorter_than_their_header_says(tmp_path):
    path = tmp_path / "samples.npz"
    np.save(tmp_path / "a.npy", IMAGES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-100])
    refused(path, "no whole .npz")


# Writing


def test_written_files_open_with_numpy(tmp_path):
    path = tmp_path / "new" / "samples.npz"
    settings = np.array(json.dumps({"name": "é"}))
    arrays = {"arr_1": LABELS, "settings": settings, "other": SIGMA.T}
    write_npz(path, arrays, iter(np.split(IMAGES, [4, 4, 20])), IMAGES.shape)
    with np.load(path) as file:
        assert set(file) == {*arrays, "arr_0"}
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    assert open_images(str(path)).settings == {"name": "é"}
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


def failing():
    yield IMAGES
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ([IMAGES, IMAGES], ValueError),
        ([IMAGES[:5]], ValueError),
        ([IMAGES[:, :7]], ValueError),
        (failing(), KeyboardInterrupt),
    ],
)
def test_failed_writing_leaves_what_was_there(tmp_path, images, error):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"before")
    with pytest.raises(error):
        write_npz(path, {}, images, IMAGES.shape)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
