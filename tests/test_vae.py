"""The autoencoder, its files, the digits and what is shipped for them."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from safetensors.numpy import load_file, save_file

from sra2_jax.data.digits import load_digits, to_grey
from sra2_jax.models import apply
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from sra2_jax.programs import convert
from sra2_jax.programs.verify import relative_error
from sra2_jax.weights import load_vae
from sra2_jax.weights.files import CONFIG, fetch
from sra2_jax.weights.vae import FORMAT, WEIGHTS, from_ldm
from tests.conftest import ROOT, one_line
from tests.test_weights import assert_same_tree, edit_config, refused

GOLDEN = ROOT / "tests" / "golden" / "vae"


@pytest.fixture(scope="module")
def golden_vae():
    return load_vae(str(GOLDEN))


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the golden autoencoder."""
    return shutil.copytree(GOLDEN, tmp_path / "vae")


def test_folders_of_pipelines_and_of_half_precision(folder, golden_vae):
    weights = load_file(folder / WEIGHTS)
    half = {name: tensor.astype(np.float16) for name, tensor in weights.items()}
    save_file(half, folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    (folder / WEIGHTS).unlink()
    _, params = load_vae(str(folder))
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float16).astype(np.float32), golden_vae[1]
    )
    assert_same_tree(params, rounded)
    refused(load_vae, folder.parent, "a whole pipeline: give ", "/vae")


# The network; its golden cases are in test_verify


def test_bfloat16_compute_stays_near_and_returns_float32(golden_vae):
    vae, params = golden_vae
    half = vae.clone(dtype=jnp.bfloat16)
    with np.load(GOLDEN / "golden.npz") as file:
        image, wanted = (jnp.moveaxis(file[name], 1, -1) for name in ("image", "mean"))
    mean, std = apply(half, params, image, method="encode")
    assert mean.dtype == std.dtype == jnp.float32
    assert 1e-5 < relative_error(mean, wanted) < 0.05


def test_sd_vae_size_and_shapes():
    vae = AutoencoderKL(VAEConfig())
    params = vae.shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    encode = functools.partial(apply, vae, method="encode")
    mean, std = jax.eval_shape(encode, params, image)
    assert mean.shape == std.shape == (1, 32, 32, 4)
    decoded = jax.eval_shape(functools.partial(apply, vae), params, image)
    assert decoded.shape == (1, 256, 256, 3)


# Reading and writing folders


def test_save_then_load_is_exact(tmp_path):
    """Without the optional parts, with a shift."""
    parts = "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"
    sizes = {"latent_channels": 16, "block_out_channels": (8,), "norm_num_groups": 4}
    without = dict.fromkeys(parts, False)
    config = VAEConfig(scaling_factor=1.5305, shift_factor=0.0609, **sizes, **without)
    draw, shapes = np.random.default_rng(0).normal, AutoencoderKL(config).shapes()
    params = jax.tree.map(lambda x: draw(size=x.shape).astype(np.float32), shapes)
    FORMAT.save(tmp_path, config, params)
    again, loaded = load_vae(str(tmp_path))
    assert again.config == config
    assert_same_tree(params, loaded)


def test_a_folder_of_an_early_diffusers(folder, golden_vae):
    """sd-vae-ft-ema's: other names of the attention, convolutions there, and a config
    without the younger keys."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if any(f".{new}.weight" in name for new in old):
            tensor = tensor[:, :, None, None]
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        tensors[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, folder / WEIGHTS)
    newer = (
        *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
        *("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"),
    )
    edit_config(folder, **dict.fromkeys(newer))
    vae, params = load_vae(str(folder))
    assert_same_tree(golden_vae[1], params)
    assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": None}, ["_class_name", "AutoencoderKL"]),
        ({"act_fn": "gelu"}, ["act_fn", "'gelu'", "'silu'"]),
        ({"latents_mean": [0.0] * 4}, ["latents_mean"]),
        ({"down_block_types": ["DownEncoderBlock2D", "K"]}, ["down_block_types", "K"]),
        ({"up_block_types": ["UpDecoderBlock2D"]}, ["up_block_types"]),
        ({"block_out_channels": [16, 32.5]}, ["choose another model"]),
    ],
)
def test_unsupported_config(folder, changes, words):
    edit_config(folder, **changes)
    refused(load_vae, folder, str(folder / CONFIG), *words)


# The digits and the autoencoder shipped for them


SIZES = {"digits": (1437, 360), "mnist": (4500, 500)}


@functools.cache
def digits(name="digits"):
    return {split: load_digits(split, name) for split in ("train", "test")}


@pytest.mark.parametrize("name", SIZES)
def test_digits(name):
    """Shapes, labels; splits that are disjoint and fixed."""
    for split, count in zip(("train", "test"), SIZES[name], strict=True):
        images, labels = digits(name)[split]
        assert (images.shape, images.dtype) == ((count, 32, 32, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((count,), np.int64)
        assert (images == images[..., :1]).all()
        share = np.bincount(labels, minlength=10) / count
        np.testing.assert_allclose(share, 0.1, atol=0.004)
    rows = np.concatenate([images[..., 0] for images, _ in digits(name).values()])
    # No two of either collection are equal, so neither are any two here.
    assert len(np.unique(rows, axis=0)) == sum(SIZES[name])
    with pytest.raises(ValueError, match="validation"):
        load_digits("validation", name)


def test_to_grey_is_close_to_the_original_digits():
    source = sklearn.datasets.load_digits()
    features = to_grey(digits()["test"][0])
    originals = source.data.astype(np.float32) / 16
    distances = np.square(features[:, None] - originals[None]).mean(-1)
    nearest = distances.argmin(1)
    np.testing.assert_array_equal(source.target[nearest], digits()["test"][1])
    assert len(set(nearest)) == 360
    assert np.sqrt(distances.min(1).mean()) < 0.08  # bicubic blurs a little


@pytest.mark.parametrize(("name", "side"), [("digits", 4), ("mnist", 8)])
def test_shipped_autoencoders_rebuild_held_out_digits(name, side):
    vae, params = load_vae(name)
    pixels = digits(name)["test"][0]

    @jax.jit
    def rebuild(params, images):
        mean, _ = apply(vae, params, images, method="encode")
        return mean, apply(vae, params, mean, method="decode")

    mean, decoded = rebuild(params, pixels / np.float32(127.5) - 1)
    assert mean.shape == (len(pixels), side, side, 4)
    rebuilt = np.clip(127.5 * np.asarray(decoded) + 127.5, 0, 255)
    assert 10 * np.log10(255**2 / np.square(rebuilt - pixels).mean()) > 22
    scaled = vae.config.scaling_factor * np.asarray(mean)
    np.testing.assert_allclose(scaled.std(), 1, atol=0.15)


def test_what_is_not_shipped_is_told():
    with one_line("mnist: no such folder"):
        fetch("mnist", "model.safetensors")


def test_va_vae_becomes_a_folder(golden, tmp_path, monkeypatch, capsys):
    """Names of latent-diffusion beside other networks' tensors, with statistics in a
    file of their own; the folder is read as diffusers' and gives the same images."""
    data = dict(np.load(golden / "ldm_vae.npz"))
    weights = {k[2:]: data[k].astype(np.float32) for k in data if k.startswith("w/")}
    more = {"loss.discriminator.main.0.weight": np.zeros((2, 2), np.float32)}
    save_file(weights | more, tmp_path / "vavae.safetensors")
    stats = {k: data[f"channel_{k}"].reshape(1, -1, 1, 1) for k in ("mean", "std")}
    np.savez(tmp_path / "stats.npz", **stats)
    out = tmp_path / "vae"
    words = ["convert", "vae", tmp_path / "vavae.safetensors", f"--out={out}"]
    words.append(f"--statistics={tmp_path / 'stats.npz'}")
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    convert.main()
    assert "latents of 6 channels, 1/4" in capsys.readouterr().out
    vae, params = load_vae(str(out))
    assert vae.config.latents_std == tuple(map(float, data["channel_std"]))
    assert vae.config.down_block_types[-1] == "AttnDownEncoderBlock2D"
    latent = jnp.moveaxis(jnp.asarray(data["latent"]), 1, -1)
    images = vae.apply({"params": params}, latent, method="decode")
    expected = np.moveaxis(data["decoded"], 1, -1)
    assert np.abs(images - expected).max() < 1e-4 * np.abs(expected).max()
    with one_line("exists already"):
        convert.main()
    del weights["decoder.mid.block_1.conv1.weight"]
    with one_line("no autoencoder of the latent-diffusion code"):
        from_ldm(weights)
