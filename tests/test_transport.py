import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.sampler import time_grid
from sra2_jax.transport import Transport, coefficients

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "data")

T = jnp.array([0.1, 0.4, 0.75, 0.95])


@pytest.mark.parametrize("path", PATHS)
def test_derivatives(path):
    """Against automatic differentiation; values against golden files in test_verify."""
    _, _, d_alpha, d_sigma = coefficients(path, T)
    for index, ours in ((0, d_alpha), (1, d_sigma)):
        exact = jax.vmap(jax.grad(lambda t, i=index: coefficients(path, t)[i]))(T)
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions(path, prediction):
    """A perfect output gives back a'x + s'eps, the score -eps/sigma, and x."""
    transport = Transport(path, prediction)
    keys = jax.random.split(jax.random.key(0))
    x, noise = (jax.random.normal(k, (4, 3, 3, 2)) for k in keys)
    x_t, target = transport.interpolate(x, noise, T)
    alpha, sigma, d_alpha, d_sigma = (
        c.reshape(-1, 1, 1, 1) for c in coefficients(path, T)
    )
    np.testing.assert_allclose(x_t, alpha * x + sigma * noise, rtol=1e-6)
    velocity = transport.velocity(target, x_t, T)
    exact = d_alpha * x + d_sigma * noise
    scale = jnp.abs(exact).max()
    np.testing.assert_allclose(velocity / scale, exact / scale, atol=2e-5)
    score = transport.score(velocity, x_t, T)
    np.testing.assert_allclose(score, -noise / sigma, rtol=2e-3, atol=2e-3)
    towards = transport.towards(x, x_t, T)
    np.testing.assert_allclose(towards / scale, exact / scale, atol=2e-5)
    # At data t counts as 1e-3: finite, where the noise would be 0 / 0.
    at_data, early = (transport.towards(x, x, jnp.full(4, t)) for t in (0.0, 1e-3))
    np.testing.assert_array_equal(at_data, early)
    assert jnp.isfinite(at_data).all()


@pytest.mark.parametrize("path", PATHS)
def test_times(path):
    """Uniform fills its range; lognormal makes log(sigma / alpha) normal."""
    key = jax.random.key(0)
    low, high = Transport(path, "noise").train_range
    t = Transport(path, "noise").sample_times(key, 20_000)
    assert low <= t.min() < low + 1e-3
    assert high - 1e-3 < t.max() <= high
    assert abs(t.mean() - 0.5) < 0.01

    t = Transport(path, time="lognormal", time_mean=-0.5, time_std=0.8).sample_times(
        key, 20_000
    )
    alpha, sigma, _, _ = coefficients(path, t.astype(jnp.float32))
    log_ratio = jnp.log(sigma / alpha)
    assert abs(log_ratio.mean() + 0.5) < 0.03
    assert abs(log_ratio.std() - 0.8) < 0.03


def test_time_shift():
    """s t / (1 + (s - 1) t): at s = 3 the middle goes to 3/4, the ends stay."""
    shifted = Transport(time_shift=3.0)
    expected = [1, 0.9, 0.75, 0.5, 0]
    np.testing.assert_allclose(time_grid("heun", 4, shifted), expected, atol=1e-12)
    assert time_grid("euler_maruyama", 9, shifted)[-2] == pytest.approx(0.12 / 1.08)
    t = shifted.sample_times(jax.random.key(0), 20_000)
    shares = [float((t < bound).mean()) for bound in (0.5, 0.75, 0.9)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75], atol=0.01)
