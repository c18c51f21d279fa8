"""Images to latents: sources, the crop, and the encoded dataset."""

import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image, PngImagePlugin

from sra2_jax.config import Config
from sra2_jax.data import images, records
from sra2_jax.data.encode import EncodeOptions, encode, main
from sra2_jax.data.pixels import center_crop, decode_rgb
from sra2_jax.errors import UserError
from sra2_jax.metrics.sets import open_images
from sra2_jax.models.dinov2 import patch_features
from sra2_jax.runtime import tensorflow
from sra2_jax.train import with_statistics
from sra2_jax.weights import load_dinov2, load_vae
from tests.conftest import one_line
from tests.test_pipeline import BATCH, read_all, take

GOLDEN = Path(__file__).parent / "golden"
VAE = str(GOLDEN / "vae")
SIDE, CLASSES = 16, ("ant", "bee")
BAD = {"ant/cut.jpg", "bee/text.png"}
OPTIONS = {"vae": VAE, "resolution": SIDE, "max_bad": 0.2, "batch_size": 4}


def run(source, folder, **changes):
    options = {"images": str(source), "out": str(folder)} | OPTIONS | changes
    return encode(EncodeOptions(**options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes: every mode and format, two files that are not images."""
    folder = tmp_path_factory.mktemp("images") / "source"
    rng = np.random.default_rng(0)

    def pixels(*shape):
        return rng.integers(0, 256, shape, np.uint8)

    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    rgb = [Image.fromarray(pixels(h, w, 3)) for h, w in [(40, 20), (16, 16), (17, 33)]]
    for i, image in enumerate(rgb):
        image.save(folder / "ant" / f"{i}.JPEG", "jpeg", quality=95)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("of the camera", "x" * 2**21, zip=True)
    rgb[0].save(folder / "ant" / "a.png", pnginfo=comment)
    rgb[1].save(folder / "ant" / "b.bmp")
    rgb[2].save(folder / "ant" / "c.webp", lossless=True)
    Image.fromarray(pixels(30, 30)).save(folder / "bee" / "grey.png")
    Image.fromarray(pixels(30, 30, 4)).save(folder / "bee" / "alpha.png")
    Image.fromarray(pixels(30, 30, 4), "CMYK").save(folder / "bee" / "cmyk.jpg")
    palette = rgb[0].convert("P")
    palette.save(folder / "bee" / "palette.png", transparency=bytes(range(200)))
    deep = rng.integers(0, 2**16, (20, 20), np.uint16)
    Image.fromarray(deep).save(folder / "bee" / "deep.PNG")
    whole = (folder / "ant" / "2.JPEG").read_bytes()
    (folder / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "text.png").write_text("not an image")
    (folder / "bee" / "notes.txt").write_text("not listed")
    (folder / "README").write_text("not a class")
    return folder


@pytest.fixture(scope="module")
def encoded(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "latents"
    info = run(folder, out)
    assert [p.name for p in out.parent.iterdir()] == ["latents"]  # no leftovers
    return out, info


@pytest.fixture(scope="module")
def extended(folder, tmp_path_factory):
    """The same latents with images and features beside them."""
    out = tmp_path_factory.mktemp("extended") / "latents"
    return out, run(folder, out, store_images=True, encoder="digits")


def read_with_tfds(folder):
    """As our reader does, which is held to that."""
    tensorflow()
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    rows = tfds.as_numpy(builder.as_dataset(split="train"))
    rows = {int(row["index"]): row for row in rows}
    for index, row in read_all(folder).items():
        for name, value in row.items():
            np.testing.assert_array_equal(rows[index][name], value)
    return builder.info, rows


def test_center_crop_is_exactly_adm():
    data = np.load(GOLDEN / "center_crop.npz")
    cases = [name for name in data if name.startswith("out_")]
    assert len(cases) == 4
    for case in cases:
        _, number, size = case.split("_")
        cropped = center_crop(data[f"in_{number}"], int(size))
        np.testing.assert_array_equal(cropped, data[case])


def test_a_thin_image_takes_no_gigabytes(monkeypatch):
    """And gives the pixels of the plain way, rounding apart."""
    draw = np.random.default_rng(0)
    for shape in ((7, 700, 3), (900, 9, 3), (24, 1701, 3), (3301, 31, 3)):
        image = draw.integers(0, 256, shape, np.uint8)
        monkeypatch.setattr("sra2_jax.data.pixels.THIN", 64)
        thin = center_crop(image, SIDE).astype(int)
        monkeypatch.setattr("sra2_jax.data.pixels.THIN", 10**9)
        assert np.abs(thin - center_crop(image, SIDE)).max() <= 3
    monkeypatch.setattr("sra2_jax.data.pixels.THIN", 64)
    image = np.zeros((60_000, 1, 3), np.uint8)
    began = time.perf_counter()
    assert center_crop(image, 256).shape == (256, 256, 3)  # 12 GB otherwise
    assert time.perf_counter() - began < 1


def test_read_keeps_order_and_reports_what_cannot_be_decoded(folder):
    source = images.open_source(folder, "train")
    rows = list(images.read(source, SIDE))
    assert source.class_names == CLASSES
    assert len(rows) == source.length == 13
    assert [row[0] for row in rows] == list(range(13))
    for _, name, image, label in rows:
        assert name.split("/")[0] == CLASSES[label]
        assert isinstance(image, Exception) == (name in BAD)
        if name not in BAD:
            assert image.shape == (SIDE, SIDE, 3)
            assert image.dtype == np.uint8


def test_folders_as_people_have_them(tmp_path):
    """Nested, of many kinds, with names that are no text; and folders of a system."""
    folder, image = tmp_path / "images", Image.new("RGB", (SIDE, SIDE), "red")
    for name in (
        *("lonely.png", "ant/0.png", "ant/deep/1.tif", "ant/deep/er/2.gif"),
        *("bee/0.ppm", "bee/1.jfif", "bee/caf\u00e9.png", os.fsdecode(b"bee/\xff.png")),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "jpeg" if name.endswith("jfif") else None
        image.save(folder / name, kind)
    (folder / "ant" / "._0.png").write_bytes(b"of a Mac")
    (folder / "bee" / "notes.txt").write_text("")
    (folder / os.fsdecode(b"bee/\xfe.png")).write_bytes(b"no image")
    source = images.open_source(folder, "train")
    assert (source.length, source.class_names) == (8, ("ant", "bee"))
    assert source.left_out == "1 .txt, 1 images in no class"
    assert len(open_images(str(folder / "ant"))) == 3
    info = run(folder, tmp_path / "out")
    assert info.num_examples == 7
    (line,) = (tmp_path / "out" / "unreadable.txt").read_text("utf-8").splitlines()
    assert line.startswith("bee/\\xfe.png\t")
    with pytest.raises(UserError, match="would be a class of --images"):
        run(folder, folder / "out")

    (folder / "lost+found").mkdir()
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._a.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no images in __MACOSX, lost\+found: .*classes"
    ):
        images.open_source(folder, "train")
    (tmp_path / "classes.txt").write_text("\ufeffbee\nant\n", "utf-8")
    source = images.open_source(folder, "train", tmp_path / "classes.txt")
    assert source.class_names == ("bee", "ant")
    assert [entry.label for entry in source.entries()] == [0] * 5 + [1] * 3


def test_modes_become_rgb(folder):
    decoded = {
        p.stem: decode_rgb(p)
        for p in (folder / "bee").glob("*.[pP]*")
        if p.stem != "text"
    }
    with Image.open(folder / "bee" / "alpha.png") as image:
        np.testing.assert_array_equal(decoded["alpha"], np.asarray(image)[..., :3])
    with Image.open(folder / "bee" / "deep.PNG") as image:
        deep = np.asarray(image) // 256
    np.testing.assert_array_equal(decoded["deep"], np.stack([deep] * 3, -1))
    grey = decoded["grey"]
    np.testing.assert_array_equal(grey, grey[..., :1].repeat(3, -1))


@pytest.mark.usefixtures("heavy")
def test_digits_and_unknown_sources(tmp_path):
    source = images.open_source("digits", "test")
    index, _, image, label = next(iter(images.read(source, 32)))
    assert (index, source.num_classes, image.shape) == (0, 10, (32, 32, 3))
    assert 0 <= label < 10
    with pytest.raises(UserError, match="no split 'val'"):
        images.open_source("digits", "val")
    with pytest.raises(UserError, match="no such folder"):
        images.open_source(tmp_path / "missing", "train")
    with pytest.raises(UserError, match="DatasetNotFoundError"):
        images.open_source("tfds:no_such_dataset_at_all", "train")


@pytest.mark.usefixtures("heavy")
def test_tfds_source(tmp_path, monkeypatch):
    tf = tensorflow()
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), np.uint8)

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(20, 24, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
        }
    )
    path = tmp_path / "tiny-test.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i, image in enumerate(pixels):
            example = features.encode_example({"image": image, "label": i % 3})
            writer.write(features.serialize_example(example))
    tfds.folder_dataset.write_metadata(data_dir=tmp_path, features=features)
    builder = tfds.builder_from_directory(tmp_path)
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    source = images.open_source("tfds:tiny:test", "train")
    assert (source.length, source.class_names) == (5, ("x", "y", "z"))
    rows = list(images.read(source, SIDE))
    assert [row[0] for row in rows] == list(range(5))
    for (index, _, image, label), whole in zip(
        images.read(source, SIDE, [0, 2, 3]), [rows[i] for i in (0, 2, 3)], strict=True
    ):
        assert (index, label) == (whole[0], whole[3])
        np.testing.assert_array_equal(image, whole[2])
    wanted = {center_crop(p, SIDE).tobytes(): i % 3 for i, p in enumerate(pixels)}
    assert {image.tobytes(): label for _, _, image, label in rows} == wanted
    scored = list(open_images("tfds:tiny:test", SIDE).batches(2))
    assert [len(part) for part in scored] == [2, 2, 1]
    assert {image.tobytes() for part in scored for image in part} == wanted.keys()
    with pytest.raises(UserError, match="needs a split 'train'"):
        images.open_source("tfds:tiny", "train")


@pytest.mark.usefixtures("heavy")
def test_tfds_datasets_that_are_not_prepared_or_have_other_labels(
    tmp_path, monkeypatch
):
    tensorflow()
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    kinds = {
        "Good": tfds.features.ClassLabel(names=["x", "y"]),
        "Scalar": tfds.features.Scalar(np.int64),
        "Bare": None,
    }

    class Made(tfds.core.GeneratorBasedBuilder):
        """Images made on the spot."""

        VERSION = tfds.core.Version("1.0.0")
        label = None

        def _info(self):
            features = {"image": tfds.features.Image(encoding_format="png")}
            if self.label:
                features["label"] = self.label
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, downloads):
            if self.MANUAL_DOWNLOAD_INSTRUCTIONS:
                downloads.manual_dir  # noqa: B018
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                row = {"image": np.full((20, 24, 3), i, np.uint8)}
                yield i, row | ({"label": i % 2} if self.label else {})

    for name, label in kinds.items():
        type(f"Made{name}", (Made,), {"label": label, "pkg_dir_path": tmp_path})
    about = "put it there by hand"
    manual = {"MANUAL_DOWNLOAD_INSTRUCTIONS": about, "pkg_dir_path": tmp_path}
    type("MadeByHand", (Made,), manual)

    rows = images.read(images.open_source("tfds:made_good", "train"), SIDE)
    assert sorted((int(image.mean()), label) for _, _, image, label in rows) == [
        (0, 0),
        (1, 1),
        (2, 0),
    ]
    for name in ("scalar", "bare"):
        with pytest.raises(
            UserError, match=r"an image and a ClassLabel label; has the"
        ):
            images.open_source(f"tfds:made_{name}", "train")
        assert len(open_images(f"tfds:made_{name}", SIDE)) == 3
    with pytest.raises(UserError, match=r"made_by_hand cannot be prepared \(Assertion"):
        images.open_source("tfds:made_by_hand", "train")


@pytest.mark.usefixtures("heavy")
def test_encoded_latents_are_those_of_the_vae(folder, encoded):
    out, info = encoded
    assert info == records.LatentsInfo.read(out)
    tfds_info, rows = read_with_tfds(out)
    assert tuple(tfds_info.features["label"].names) == CLASSES
    assert tfds_info.splits["train"].num_examples == len(rows) == 11
    unreadable = (out / "unreadable.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in unreadable} == BAD

    module, params = load_vae(VAE)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    sampled = []
    for index, name, image, label in images.read(
        images.open_source(folder, "train"), SIDE
    ):
        if name in BAD:
            assert index not in rows
            continue
        mean, std = apply(image[None] / np.float32(127.5) - 1)
        row = rows[index]
        assert row["label"] == label
        assert row["mean"].dtype == np.float16
        np.testing.assert_allclose(row["mean"], mean[0], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(row["std"], std[0], rtol=2e-3, atol=2e-3)
        noise = np.random.default_rng(index).standard_normal((4000, *std.shape))
        sampled.append((mean + std * noise) * 0.18215)
    drawn = np.stack(sampled).reshape(-1, 4)
    scale = drawn.std(0).max()
    np.testing.assert_allclose(info.latent_mean, drawn.mean(0), atol=0.01 * scale)
    np.testing.assert_allclose(info.latent_std, drawn.std(0), atol=0.01 * scale)


def test_statistics_by_channel_go_from_the_vae_to_the_config(folder, encoded, tmp_path):
    """Into the dataset, and into a config that has none of its own."""
    shutil.copytree(VAE, tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    fields, (other, plain) = json.loads(file.read_text()), encoded
    count, scale = plain.latent_shape[-1], plain.scaling_factor
    mean, std = np.arange(count) - 1.5, 1 + 0.5 * np.arange(count)
    fields |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    file.write_text(json.dumps(fields))
    out = epath.Path(tmp_path / "out")
    run(folder, out, vae=str(tmp_path / "vae"))
    info = records.LatentsInfo.read(out)
    expected = (np.array(plain.latent_mean) / scale - mean) / std * scale
    np.testing.assert_allclose(info.latent_mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        info.latent_std, np.array(plain.latent_std) / std, rtol=1e-5
    )
    config = Config().override(
        {
            "data.resolution": SIDE, "data.num_classes": 2,
            "latents.size": info.latent_shape[0], "latents.channels": count,
            "latents.scaling_factor": scale, "latents.shift_factor": info.shift_factor,
        }
    )  # fmt: skip
    with one_line("config says latents.mean=()"):
        records.check(info, out, config)
    filled = with_statistics(config, out)
    records.check(info, out, filled)
    assert filled.latents.std == tuple(std)
    assert with_statistics(config, epath.Path(other)) == config
    first = config.override({"data.images": f"{folder}", "vae": str(tmp_path / "vae")})
    filled = with_statistics(first, epath.Path(tmp_path / "none yet"))
    assert filled.latents.mean == tuple(mean)


@pytest.mark.usefixtures("heavy")
def test_images_and_features_are_stored_exactly(folder, extended):
    out, info = extended
    assert info == records.LatentsInfo.read(out)
    assert info.images
    assert info.features == records.Features("digits", 4, 64)  # half of 8 by default
    _, rows = read_with_tfds(out)
    module, params = load_dinov2("digits")
    apply = jax.jit(lambda x: patch_features(module, params, x, 4))
    source = images.read(images.open_source(folder, "train"), SIDE)
    crops = {index: image for index, name, image, _ in source if name not in BAD}
    assert crops.keys() == rows.keys()
    for index, row in rows.items():
        np.testing.assert_array_equal(row["image"], crops[index])
        assert row["features"].dtype == np.float16
        wanted = apply(row["image"][None])[0]
        np.testing.assert_allclose(row["features"], wanted, rtol=1e-3, atol=1e-3)

    read = take(out, 2, fields=("image", "features"))
    assert read["index"].shape == (2, BATCH)
    for step, row in np.ndindex(read["index"].shape):
        stored = rows[int(read["index"][step, row])]
        for name in ("mean", "std", "image", "features"):
            assert read[name].dtype == stored[name].dtype
            np.testing.assert_array_equal(read[name][step, row], stored[name])


def test_images_and_features_do_not_change_the_batches(encoded, extended):
    plain = take(encoded[0], 5)
    assert set(plain) == {"label", "index", "mean", "std"}
    read = take(extended[0], 5, fields=("features", "image"))
    for name, value in plain.items():
        np.testing.assert_array_equal(read[name], value)


def test_encode_refuses(folder, encoded, tmp_path):
    out, _ = encoded
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(UserError, match="dtype: 'float32' there, 'bfloat16' now"):
        run(folder, out, dtype="bfloat16")
    assert sorted(p.name for p in out.iterdir()) == before
    with pytest.raises(UserError, match="nothing is overwritten"):
        run(folder, folder)
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        run(empty, tmp_path / "a")
    (empty / "class" / "x.png").write_text("nothing")
    with pytest.raises(UserError, match="none of the images"):
        run(empty, tmp_path / "a", max_bad=1.0)
    for changes, match in [
        ({"resolution": 15}, "not a multiple of 2"),
        ({"grid": 4}, "--grid=4 .* only with an encoder"),
        ({"shards": 14}, "--shards=14 for 13 images"),
        ({"split": "../x"}, "--split"),
        ({"process_index": 1}, "--process_index"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"out": "gs://bucket/x"}, "gs://bucket/x: give a local folder"),
    ]:
        with pytest.raises(UserError, match=match):
            run(folder, tmp_path / "a", **changes)
    # Good shards of a source with too many bad images are kept.
    with pytest.raises(UserError, match=r"more than --max_bad=0.1 .*(cut|text)"):
        run(folder, tmp_path / "bad", max_bad=0.1)
    assert {p.name for p in tmp_path.iterdir()} == {"empty", ".bad.incomplete"}


@pytest.mark.parametrize("what", ["mean", "features"])
def test_numbers_too_large_for_float16_are_refused(tmp_path, monkeypatch, what):
    source = tmp_path / "source" / "class"
    source.mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE)).save(source / "x.png")
    loader = "load_vae" if what == "mean" else "load_dinov2"
    load = {"load_vae": load_vae, "load_dinov2": load_dinov2}[loader]
    module, params = load(VAE if what == "mean" else "digits")
    layer = params["quant_conv"] if what == "mean" else params["norm"]
    layer["bias"] = layer["bias"] + 1e5
    monkeypatch.setattr(f"sra2_jax.data.encode.{loader}", lambda _: (module, params))
    with pytest.raises(UserError, match=f"^the {what} of image 0 is .* float16"):
        run(source.parent, tmp_path / "out", encoder="digits")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_flags(capsys, monkeypatch):
    """One line for a wrong flag, and no default that the class does not have."""
    for line, match in [
        ("--images=digits --vae=digits", "--out must be given"),
        ("--resolution=x", "--resolution: invalid int value: 'x' "),
        ("--dtype=float64", "--dtype: invalid choice"),
        ("--image=x", "unknown flag --image: did you mean --images?"),
    ]:
        monkeypatch.setattr("sys.argv", ["encode", *line.split()])
        with pytest.raises(UserError, match=match):
            main()
    monkeypatch.setattr("sys.argv", ["encode", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in EncodeOptions.__dataclass_fields__)
