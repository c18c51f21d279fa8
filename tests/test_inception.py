"""Inception against torch-fidelity's features, and its files."""

import hashlib
import sys

import jax
import numpy as np
import pytest

from sra2_jax.errors import UserError
from sra2_jax.metrics.features import make_features
from sra2_jax.programs import convert
from sra2_jax.programs.verify import inception_weights, relative_error
from sra2_jax.sharding import make_mesh
from sra2_jax.weights.files import write_file
from sra2_jax.weights.inception import load_inception
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def data():
    return dict(np.load(ROOT / "tests" / "golden" / "inception.npz"))


@pytest.fixture(scope="module")
def weights(data):
    return inception_weights(data)


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    write_file(path, weights, {})
    return path


def test_features_over_all_devices(data, file):
    """Golden values, in uneven batches: rows that fill up a batch are left out."""
    rows = np.arange(3) % 2
    mesh = make_mesh(devices=jax.devices()[:2])
    features = make_features("inception", str(file), mesh, batch=4)
    out = features(data["images"][rows])
    assert relative_error(out["pool"], data["pool3"][rows]) < 1e-4
    spatial = data["spatial7"][rows].reshape(3, -1)
    assert relative_error(out["spatial"], spatial) < 1e-4
    expected = np.exp(data["logits_unbiased"].astype(np.float64))
    expected /= expected.sum(axis=1, keepdims=True)
    assert relative_error(out["probabilities"], expected[rows]) < 1e-4
    assert features.facts["inception"] == "weights.npz"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert features.facts["inception_sha256"] == digest


def test_converted_weights_are_the_same(file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "inception.safetensors"
    command = ["convert", "inception", str(file), f"--out={out}"]
    monkeypatch.setattr(sys, "argv", command)
    convert.main()
    assert "472 tensors of weights.npz" in capsys.readouterr().out
    (_, a), (_, b) = load_inception(str(file)), load_inception(str(out))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(UserError, match="exists already"):
        convert.main()


def test_refusals(weights, file, tmp_path):
    with pytest.raises(UserError, match=r"inception.safetensors: no such.*releases"):
        load_inception("inception.safetensors")
    damaged = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    damaged.write_bytes(b"cut off")
    with pytest.raises(UserError, match="SHA-256 does not begin with 6726825d"):
        load_inception(str(damaged))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut.npz: cannot be read \(BadZipFile"):
        load_inception(str(cut))
    shapes = {k: np.broadcast_to(np.float32(1), v.shape) for k, v in weights.items()}
    layer = "Conv2d_1a_3x3"
    for changed, message in (
        (
            {f"{layer}.conv.weight": np.zeros((32, 3, 3, 4), np.float32)},
            f"{layer}.weight is .32, 3, 3, 4., .32, 3, 3, 3. expected",
        ),
        ({f"{layer}.bn.bias": np.zeros(5, np.float32)}, "could not be broadcast"),
        ({f"{layer}.bn.bias": np.float32(0)}, f"'{layer}.bn.bias'"),
        ({"AuxLogits.fc.bias": np.zeros(9)}, "AuxLogits.fc.bias is .9,., no such"),
    ):
        path = tmp_path / "other.npz"
        np.savez(path, **shapes | changed)
        with pytest.raises(UserError, match=f"not the Inception network.*{message}"):
            load_inception(str(path))
