import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.config import Config
from sra2_jax.data.digits import load_digits, to_grey
from sra2_jax.generator import Generator, draw_labels, grid, make_sampler, to_uint8
from sra2_jax.metrics.compare import compare, summarise
from sra2_jax.metrics.features import make_features
from sra2_jax.metrics.moments import frechet_distance, gaussian
from sra2_jax.metrics.sets import ImageSet
from sra2_jax.sampler import Guidance
from sra2_jax.weights import load_vae
from tests.test_step import program_of


def test_to_uint8():
    """Both references cut off the fraction."""
    x = np.array([-2.0, -1.0, -0.001, 0.0, 0.5, 1.0, 2.0], np.float32)
    x = jnp.asarray(np.repeat(x, 3).reshape(1, 1, -1, 3))
    for rounding, zero in (("truncate", 127), ("sit", 128)):
        ours = to_uint8(x, rounding)[0, 0, :, 0]
        np.testing.assert_array_equal(ours, [0, 0, 127, zero, 191, 255, 255])


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
    # Zero-initialised layers would hide the label.
    params = jax.tree.map(
        lambda p: p + 0.05 * np.sin(np.arange(p.size)).reshape(p.shape),
        jax.device_get(program_of(tiny).start().params),
    )

    def images(devices, batch_size, indices, label=3):
        tiny.sampling.batch_size = batch_size
        generate = Generator(program_of(tiny, devices), vae, vae_params, params)
        labels = np.full(len(indices), label)
        return np.concatenate([*generate(np.array(indices), labels)])

    return images


def test_an_image_depends_on_its_index_alone(make):
    """Not on the batch it is in, its place there, or the number of devices; and on
    its label."""
    whole = make(1, 8, range(6)).astype(int)
    assert np.abs(whole[0] - whole[1]).mean() > 5
    others = make(8, 8, [4, 2, 0]).astype(int)
    assert np.abs(others - whole[[4, 2, 0]]).max() <= 1
    assert (make(1, 8, [0], label=7) != whole[:1]).any()


def test_the_next_batch_is_on_its_way_while_one_is_used(tiny, monkeypatch):
    """What is done with a batch costs the device no time; all come, in order."""
    sent = []

    def run(_, indices, labels):
        sent.append(list(indices))
        return jnp.ones((len(indices), 4, 4, 4)) * indices[:, None, None, None]

    monkeypatch.setattr("sra2_jax.generator.make_sampler", lambda *_: run)
    tiny.sampling.batch_size = 2
    generate = Generator(program_of(tiny), *load_vae("digits"))
    batches = generate(np.arange(10, 15), np.zeros(5))
    first = next(batches)
    assert sent == [[10, 11], [12, 13]]
    rest = list(batches)
    assert sent == [[10, 11], [12, 13], [14, 14]]
    assert [len(part) for part in (first, *rest)] == [2, 2, 1]


def test_latents_by_channel_are_decoded_as_they_were(tiny, monkeypatch):
    """The decoder sees z / scale + shift, channel by channel."""
    raw = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    tiny.latents.mean, tiny.latents.std = (0.5, 1.0, -2.0, 3.0), (1.0, 2.0, 0.5, 4.0)
    z = (raw - [0.5, 1, -2, 3]) / [1, 2, 0.5, 4] * tiny.latents.scaling_factor
    monkeypatch.setattr("sra2_jax.generator.make_sampler", lambda *_: lambda *_: z)
    tiny.sampling.batch_size = 2
    generate = Generator(program_of(tiny), *load_vae("digits"))
    (images,) = generate(np.arange(2), np.zeros(2))
    off = images.astype(int) - generate.decode(raw).astype(int)
    assert np.abs(off).max() <= 1


def test_sampling_settings_act(tiny, monkeypatch):
    """Each reaches the sampler, whose own tests show what it does."""
    given = {}

    def sample(velocity, x, labels, **named):
        given.update(named)
        return x

    monkeypatch.setattr("sra2_jax.sampler.sample", sample)
    s = tiny.sampling
    s.method, s.steps, s.guidance, s.guidance_channels = "heun", 7, 5.0, 2
    s.guidance_low, s.guidance_high = 0.25, 0.5
    s.head_guidance, s.head_guidance_low, s.head_guidance_high = 2.0, 0.125, 0.75
    program = program_of(tiny)
    jax.eval_shape(make_sampler(program), program.abstract.ema, *np.zeros((2, 1), int))
    assert (given["method"], given["steps"], given["null"]) == ("heun", 7, 10)
    assert given["guidance"] == Guidance(5.0, 0.25, 0.5, 2)
    assert given["head"] == Guidance(2.0, 0.125, 0.75)


def test_labels_follow_from_seed_and_index(tiny):
    """Random ones are uniform, and neither order nor company matters."""
    tiny.sampling.labels = "random"
    labels = draw_labels(Config.of(tiny), np.arange(5000))
    some = draw_labels(Config.of(tiny), np.array([4000, 7]))
    np.testing.assert_array_equal(some, labels[[4000, 7]])
    counts = np.bincount(labels, minlength=10)
    assert np.sum((counts - 500) ** 2) / 500 < 27.9  # chi-squared, 9 dof, p = 0.001
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 0.05
    tiny.seed = 1
    assert np.mean(draw_labels(Config.of(tiny), np.arange(5000)) == labels) < 0.2
    tiny.sampling.labels = "balanced"
    counts = np.bincount(draw_labels(Config.of(tiny), np.arange(5000)))
    np.testing.assert_array_equal(counts, 500)


def image_set(parts, labels=None):
    shape = sum(map(len, parts)), 32, 32, 3
    return ImageSet("digits", shape, lambda _: iter(parts), labels)


def test_proxy_knows_real_digits():
    features = make_features("digits", "", None, 0)
    images, labels = load_digits("test")

    def scores(images, labels):
        """In two uneven batches."""
        found = image_set([images[:100], images[100:]], labels)
        return compare(features, summarise(features, found, 0, 360), real)

    real = summarise(features, image_set([images]), 0, 360)
    same = scores(images, labels)
    assert same["accuracy"] > 0.97
    assert abs(same["frechet"]) < 1e-6
    assert same["precision"] == same["recall"] == 1
    wrong = scores(255 - images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.2
    assert wrong["frechet"] > 1
    assert wrong["precision"] == 0
    expected = frechet_distance(
        *gaussian(to_grey(255 - images)), *gaussian(to_grey(images))
    )
    assert wrong["frechet"] == pytest.approx(expected, rel=1e-9)
    some = summarise(features, image_set(np.split(images, [7, 200])), 0, keep=5).kept
    expected = to_grey(images[[0, 90, 180, 269, 359]])  # spread evenly
    np.testing.assert_allclose(some, expected, atol=1e-6)
