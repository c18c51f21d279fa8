"""The DINOv2 encoder, its files and the one shipped for the digits."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.neighbors import KNeighborsClassifier

from sra2_jax.data.digits import load_digits
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config, patch_features, preprocess
from sra2_jax.programs.verify import relative_error
from sra2_jax.weights import load_dinov2
from sra2_jax.weights.dinov2 import FORMAT, WEIGHTS
from sra2_jax.weights.files import CONFIG
from tests.test_weights import assert_same_tree, edit_config, refused, shard
from tools.train_encoder import pooled_features

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
    return shutil.copytree(source, tmp_path / "dinov2")


# The network


def test_bfloat16_compute_stays_near_and_returns_float32(case):
    """The golden case itself is in test_verify."""
    module, params, pixels, tokens = case
    out = apply(module.clone(dtype=jnp.bfloat16), params, pixels)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, tokens) < 0.03


@pytest.mark.parametrize(
    ("antialias", "expected"), [(False, TOKENS_TRANSFORMERS), (True, TOKENS_REPA)]
)
def test_positions_are_resized(case, antialias, expected):
    module, params, pixels, _ = case
    out = apply(module.clone(antialias=antialias), params, pixels[:, :42])
    np.testing.assert_allclose(out[1, :, 7], expected, atol=1e-5)
    with pytest.raises(TypeError, match="cannot reshape"):
        apply(module, params, pixels[:, :50])


def test_dinov2_base_has_all_its_parameters():
    """As many as transformers' Dinov2Model, the mask token among them."""
    module = DINOv2(DINOv2Config())
    params = module.shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 86_580_480
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8)
    features = jax.eval_shape(
        lambda tree, x: patch_features(module, tree, x, 16), params, images
    )
    assert features.shape == (2, 256, 768)


def test_preprocess():
    """Of its size: ImageNet's mean removed, over its standard deviation."""
    images = (37 * np.arange(6 * 6 * 3) % 256).reshape(1, 6, 6, 3).astype(np.uint8)
    expected = np.subtract([111, 148, 185], [123.675, 116.28, 103.53])
    expected /= [58.395, 57.12, 57.375]
    np.testing.assert_allclose(
        preprocess(jnp.asarray(images), 6)[0, 0, 1], expected, rtol=1e-5
    )


# Reading and writing folders


def test_shards_of_an_early_image_classifier(folder, source):
    edit_config(folder, use_mask_token=None)  # newer than the published files
    tensors = {f"dinov2.{k}": v for k, v in load_file(folder / WEIGHTS).items()}
    tensors |= {"classifier.weight": np.zeros((5, 96)), "classifier.bias": np.zeros(5)}
    shard(folder, WEIGHTS, tensors)
    assert_same_tree(load_dinov2(str(folder))[1], load_dinov2(str(source))[1])


def test_without_optional_parts(tmp_path):
    sizes = {"image_size": 9, "patch_size": 4}
    config = DINOv2Config(8, 1, 2, qkv_bias=False, use_mask_token=False, **sizes)
    draw, shapes = np.random.default_rng(0).normal, DINOv2(config).shapes()
    params = jax.tree.map(lambda x: draw(size=x.shape).astype(np.float32), shapes)
    FORMAT.save(tmp_path, config, params)
    module, loaded = load_dinov2(str(tmp_path))
    assert module.config == config
    assert "bias" not in loaded["blocks"]["query"]
    assert_same_tree(loaded, params)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "dinov2_with_registers"}, ["model_type", "'dinov2'"]),
        ({"use_swiglu_ffn": True}, ["use_swiglu_ffn", "True"]),
        ({"image_size": [56, 56]}, ["choose another model"]),
        ({"num_attention_heads": 5}, ["choose another model"]),
    ],
)
def test_unsupported_config(folder, changes, words):
    edit_config(folder, **changes)
    refused(load_dinov2, folder, str(folder / CONFIG), *words)


# The encoder shipped for the digits


def test_shipped_encoder_tells_held_out_digits_apart():
    """Measured, nearest neighbour: 97.5 % right; untrained 66 %, 8x8 pixels 98.9 %."""
    module, params = load_dinov2("digits")
    (train_pixels, train_labels), (pixels, labels) = map(load_digits, ("train", "test"))
    classifier = KNeighborsClassifier(1)
    classifier.fit(pooled_features(module, params, train_pixels), train_labels)
    features = pooled_features(module, params, pixels)
    assert classifier.score(features, labels) > 0.95
