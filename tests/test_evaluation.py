import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.evaluation.generate import grid, make_generate, to_uint8
from sra2_jax.evaluation.metrics import frechet_distance, gaussian
from sra2_jax.evaluation.proxy import DigitsProxy
from sra2_jax.pretrained import load_vae
from sra2_jax.training.optim import make_optimizer
from sra2_jax.training.sharding import make_mesh
from sra2_jax.training.state import create_sharded


def test_frechet_distance(golden):
    """ADM's fid and sfid, and the closed form for diagonal covariances."""
    data = np.load(golden / "adm_metrics.npz")
    for kind, a, b in (
        ("fid", "ref", "samples"),
        ("sfid", "spatial_ref", "spatial_samples"),
    ):
        ours = frechet_distance(*gaussian(data[a]), *gaussian(data[b]))
        assert ours == pytest.approx(float(data[kind]), rel=1e-6)
    exact = 1 + 4 + (3 - 2) ** 2 + (1 - 5) ** 2
    ours = frechet_distance(
        np.zeros(2), np.diag([9.0, 1.0]), np.array([1.0, 2.0]), np.diag([4.0, 25.0])
    )
    assert ours == pytest.approx(exact)


def test_to_uint8():
    """Both references cut off the fraction."""
    x = jnp.array([-2.0, -1.0, -0.001, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, -1, 1)
    x = jnp.repeat(x, 3, axis=-1)
    ours = to_uint8(x, "truncate")[0, 0, :, 0]
    np.testing.assert_array_equal(ours, [0, 0, 127, 127, 191, 255, 255])
    ours = to_uint8(x, "sit")[0, 0, :, 0]
    np.testing.assert_array_equal(ours, [0, 0, 127, 128, 191, 255, 255])


def test_grid():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones(
        (1, 2, 3, 3), np.uint8
    )
    picture = grid(images, 2, border=1)
    assert picture.shape == (3 * 3 + 1, 2 * 4 + 1, 3)
    assert (picture[7:9, 1:4] == 4).all()
    assert (picture[7:9, 5:8] == 255).all()  # the empty place
    assert (picture[1:3, 5:8] == 1).all()


@pytest.fixture
def make(tiny):
    """images(devices, batch_size, indices) of one random network."""
    vae, vae_params = load_vae("digits")
    transform, _ = make_optimizer(**tiny.optim)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    _, init = create_sharded(tiny, transform, one)
    # Zero-initialised layers would hide the label.
    params = jax.device_get(
        jax.tree.map(
            lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size).reshape(p.shape)),
            init().params["network"],
        )
    )

    def images(devices, batch_size, indices, label=3, **sampling):
        tiny.sampling.batch_size = batch_size
        tiny.sampling.update(sampling)
        mesh = make_mesh(-1, 1, 8, devices=jax.devices()[:devices])
        generate = make_generate(tiny, mesh, vae, vae_params)
        return generate(params, np.array(indices), np.full(len(indices), label))

    return images


def test_an_image_depends_on_its_index_alone(make):
    """Not on the batch it is in, its place there, or the number of devices."""
    whole = make(1, 8, range(6)).astype(int)
    assert np.abs(whole[0] - whole[1]).mean() > 5
    parts = make(1, 2, [4, 2, 0]).astype(int)
    assert np.abs(parts - whole[[4, 2, 0]]).max() <= 1
    sharded = make(8, 8, range(6)).astype(int)
    assert np.abs(sharded - whole).max() <= 1


def test_sampling_settings_act(make):
    """Method, label, guidance and its channels each change the picture."""
    pictures = [
        make(1, 1, [0]),
        make(1, 1, [0], label=7),
        make(1, 1, [0], guidance=5.0),
        make(1, 1, [0], guidance=5.0, guidance_channels=2),
        make(1, 1, [0], guidance=5.0, guidance_channels=0, guidance_high=0.5),
        make(1, 1, [0], guidance=1.0, method="euler"),
        make(1, 1, [0], method="heun"),
    ]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a != b).any()


def test_proxy_knows_real_digits():
    proxy = DigitsProxy()
    images, labels = proxy.test
    real = proxy.score(images, labels)
    assert real["accuracy"] > 0.97
    assert abs(real["frechet"]) < 1e-6
    wrong = proxy.score(255 - images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.2
    assert wrong["frechet"] > 1
    reference = proxy.reference(images)
    assert reference["reconstruction_accuracy"] == real["accuracy"]
    assert 0 < reference["real_frechet"] < 0.1
