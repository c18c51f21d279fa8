"""models/dinov2.py, pretrained/dinov2.py and the shipped encoder of digits."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from sra2_jax.data.digits import load_digits
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config, patch_features, preprocess
from sra2_jax.programs.verify import relative_error
from sra2_jax.weights import load_dinov2
from sra2_jax.weights.dinov2 import DIGITS, INDEX, WEIGHTS, save_dinov2
from sra2_jax.weights.files import CONFIG, read_safetensors
from tools.train_digits_encoder import pooled_features

# Channel 7 of the second golden image's tokens, cut to 42x56 pixels, so that the 4x4
# positions become 3x4: transformers 5.23 Dinov2Model as it is, ...
TOKENS_TRANSFORMERS = [
    -0.884041, 0.207470, 1.729661, -0.330196, -0.511238, -0.404071, -2.554207,
    -3.002555, 0.909929, -2.059592, 1.460953, -0.154341, -0.888283,
]  # fmt: skip
# ... and with its positions resized by torch 2.13's F.interpolate(table, (3, 4),
# mode="bicubic", antialias=True), the call in timm's resample_abs_pos_embed.
TOKENS_REPA = [
    -0.884425, 0.206135, 1.731907, -0.335381, -0.509731, -0.405296, -2.560773,
    -3.005497, 0.913985, -2.056836, 1.473900, -0.144619, -0.896573,
]  # fmt: skip
# Green of 37 * i % 256 as a 6x6 image, normalised, then F.interpolate(x, side,
# mode="bicubic") of torch 2.13 in float64.
RESIZED = {
    4: [
        -0.491815, -1.054365, 0.071486, 0.457392, 0.083659, -0.528744, -0.026375,
        0.309677, 1.659631, 1.388820, -0.294246, -0.565058, -0.440389, -1.143267,
        0.938561, 0.235683,
    ],
    7: [
        -1.611817, 0.501151, -1.277997, -1.472157, 1.111602, 1.656359, -0.886511,
        1.070828, -0.905208, -0.041168, -0.768055, -1.242671, 1.078931, 1.775594,
        -0.031170, 0.635982, -0.208571, -0.252846, -0.570531, -1.100941, 1.372566,
        0.884196, 0.658975, 0.391264, 0.126401, -0.112624, -0.486104, -1.070971,
        2.087913, 0.707053, 1.186363, 0.695136, 0.041363, 0.381005, -0.736589,
        -0.194405, 2.145558, 0.219678, 0.434703, 1.152533, -0.341306, 1.184288,
        -1.525190, 0.390038, -1.261288, -1.498602, 1.029271, 1.753964, -0.809446,
    ],
}  # fmt: skip


@pytest.fixture
def source(golden):
    return golden / "dinov2"


@pytest.fixture
def case(source):
    """Module, parameters, pixels NHWC and the expected tokens."""
    data = np.load(source / "golden.npz")
    pixels = jnp.asarray(data["pixel_values"].transpose(0, 2, 3, 1))
    return *load_dinov2(str(source)), pixels, data["last_hidden_state"]


@pytest.fixture
def folder(source, tmp_path):
    """A writable copy of the golden encoder."""
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, tmp_path / name)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# The network


def test_golden_tokens(case):
    module, params, pixels, tokens = case
    out = module.apply({"params": params}, pixels)
    assert relative_error(out, tokens) <= 1e-5


def test_bfloat16_stays_near_and_returns_float32(case):
    module, params, pixels, tokens = case
    half = module.clone(dtype=jnp.bfloat16)
    out = half.apply({"params": params}, pixels)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, tokens) < 0.03


@pytest.mark.parametrize(
    ("antialias", "expected"), [(False, TOKENS_TRANSFORMERS), (True, TOKENS_REPA)]
)
def test_positions_are_resized(case, antialias, expected):
    module, params, pixels, _ = case
    module = module.clone(antialias=antialias)
    out = module.apply({"params": params}, pixels[:, :42])
    np.testing.assert_allclose(out[1, :, 7], expected, atol=1e-5)


def test_dinov2_base_has_all_its_parameters():
    """As many as transformers' Dinov2Model, the mask token among them."""
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    module = DINOv2(DINOv2Config())
    variables = jax.eval_shape(module.init, jax.random.key(0), pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 86_580_480
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8)
    features = jax.eval_shape(
        lambda tree, x: patch_features(module, tree, x, 16), variables["params"], images
    )
    assert features.shape == (2, 256, 768)


@pytest.mark.parametrize("side", [4, 7])
def test_preprocess_equals_torch(side):
    images = (37 * np.arange(6 * 6 * 3) % 256).reshape(1, 6, 6, 3).astype(np.uint8)
    out = preprocess(jnp.asarray(images), side)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[0, ..., 1].ravel(), RESIZED[side], atol=2e-6)
    same = preprocess(jnp.asarray(images), 6)
    np.testing.assert_allclose(
        same[0, 0, 1], np.subtract([111, 148, 185], [123.675, 116.28, 103.53])
        / [58.395, 57.12, 57.375], rtol=1e-5,
    )  # fmt: skip


def test_partial_patches_are_refused(case):
    module, params, pixels, _ = case
    with pytest.raises(ValueError, match="50x56 pixels"):
        module.apply({"params": params}, pixels[:, :50])


# Reading and writing folders


def test_saved_files_equal_those_of_transformers(source, tmp_path):
    module, params = load_dinov2(str(source))
    save_dinov2(tmp_path, module.config, params)
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(source / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads(
        (source / CONFIG).read_text()
    )


def test_shards_of_an_early_image_classifier(folder, source):
    fields = json.loads((folder / CONFIG).read_text())
    del fields["use_mask_token"]  # newer than the published files
    (folder / CONFIG).write_text(json.dumps(fields))
    tensors = {f"dinov2.{k}": v for k, v in load_file(folder / WEIGHTS).items()}
    tensors |= {"classifier.weight": np.zeros((5, 96)), "classifier.bias": np.zeros(5)}
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_tree(load_dinov2(str(folder))[1], load_dinov2(str(source))[1])


def test_half_precision_files_load_as_float32(tmp_path, case):
    module, params, *_ = case
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_dinov2(tmp_path, module.config, half)
    stored = read_safetensors(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(jnp.bfloat16)}
    wanted = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    assert_same_tree(load_dinov2(str(tmp_path))[1], wanted)


def test_without_optional_parts(tmp_path):
    config = DINOv2Config(
        8, 1, 2, image_size=9, patch_size=4, qkv_bias=False, use_mask_token=False
    )
    params = DINOv2(config).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    save_dinov2(tmp_path, config, params)
    module, loaded = load_dinov2(str(tmp_path))
    assert module.config == config
    assert "bias" not in loaded["blocks"]["query"]
    assert_same_tree(loaded, jax.tree.map(np.asarray, params))


# What a user may get wrong


def refused(source, *words):
    """load_dinov2(source) must fail with one line that holds all the words."""
    with pytest.raises(UserError) as caught:
        load_dinov2(str(source))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "dinov2_with_registers"}, ["model_type", "'dinov2'"]),
        ({"use_swiglu_ffn": True}, ["use_swiglu_ffn", "True"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act", "'gelu_new'"]),
        ({"num_channels": 1}, ["num_channels is 1"]),
        ({"image_size": [56, 56]}, ["image_size", "int expected"]),
        ({"num_attention_heads": 5}, ["num_attention_heads 5", "48"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"image_size": 13}, ["image_size 13", "14"]),
    ],
)
def test_unsupported_config(folder, changes, words):
    edit_config(folder, **changes)
    refused(folder, str(folder / CONFIG), *words)


def test_missing_folder_file_and_key(folder):
    refused(folder / "nowhere", "no such folder", "owner/name", WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, str(folder / WEIGHTS), "no such file")
    (folder / CONFIG).write_text("{}")
    refused(folder, str(folder / CONFIG), "model_type is missing")


def test_missing_surplus_and_misshaped_tensors(folder):
    path = folder / WEIGHTS
    tensors = load_file(path)
    name = "encoder.layer.1.mlp.fc1.weight"
    save_file({key: t for key, t in tensors.items() if key != name}, path)
    refused(folder, str(path), "1 tensors missing", name)
    save_file(tensors | {"classifier.bias": np.zeros(3, np.float32)}, path)
    refused(folder, str(path), "1 tensors unexpected", "classifier.bias")
    save_file(tensors | {name: tensors[name][:9]}, path)
    refused(folder, str(path), name, "(9, 48)", "(192, 48)")
    save_file(tensors, path)
    edit_config(folder, image_size=70)
    refused(folder, "position_embeddings", "(1, 17, 48)", "(1, 26, 48)")


def test_hub_id_is_downloaded(monkeypatch, source):
    asked = {}

    def snapshot_download(repo, **arguments):
        asked.update(repo=repo, **arguments)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_dinov2("facebook/dinov2-base")
    assert asked["repo"] == "facebook/dinov2-base"
    assert {CONFIG, WEIGHTS, INDEX} < set(asked["allow_patterns"])


# The encoder shipped for the digits


def test_shipped_encoder_tells_held_out_digits_apart():
    """Measured, nearest neighbour: 97.5 % right; untrained 66 %, 8x8 pixels 98.9 %."""
    assert sum(file.stat().st_size for file in DIGITS.iterdir()) < 700_000
    module, params = load_dinov2("digits")
    assert module.config == dataclasses.replace(
        module.config, hidden_size=64, image_size=32, patch_size=8
    )
    (train_pixels, train_labels), (pixels, labels) = map(load_digits, ("train", "test"))
    classifier = KNeighborsClassifier(1)
    classifier.fit(pooled_features(module, params, train_pixels), train_labels)
    features = pooled_features(module, params, pixels)
    assert classifier.score(features, labels) > 0.95
