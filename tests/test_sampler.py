"""Paths, and samplers on fields known exactly; the rest is test_verify's, which holds
both to the golden files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.sampler import Guidance, sample, time_grid
from sra2_jax.transport import Transport, coefficients

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "noise", "data")

T = jnp.array([0.1, 0.4, 0.75, 0.95])


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


def counted(method, guidance, steps=10):
    """Rows the network saw in each call of a trajectory with a batch of 2."""
    rows = []

    def velocity(x, t, y):
        jax.debug.callback(lambda t, y: rows.append((float(t[0]), y.tolist())), t, y)
        return -x

    out = sample(
        velocity,
        jnp.ones((2, 1, 1, 3)),
        jnp.array([4, 5]),
        null=9,
        method=method,
        steps=steps,
        transport=Transport(),
        guidance=guidance,
        noise=lambda i: jnp.zeros((2, 1, 1, 3)),
    )
    jax.effects_barrier()
    jax.block_until_ready(out)
    return sorted(rows, reverse=True)


@pytest.mark.parametrize(("method", "calls"), [("euler", 10), ("heun", 19)])
def test_no_unconditional_call_outside_the_interval(method, calls):
    rows = counted(method, Guidance(2.0, 0.3, 0.65))  # 0.3 is on the grid
    assert len(rows) == calls
    # times 1.0, 0.9 ... 0.1; a Heun step follows the decision made at its start
    paired = [t for t, y in rows if y == [4, 9, 5, 9]]
    alone = [t for t, y in rows if y == [4, 5]]
    assert len(paired) + len(alone) == calls
    starts = {"euler": [0.6, 0.5, 0.4, 0.3]}.get(
        method, [0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2]
    )
    np.testing.assert_allclose(paired, starts, atol=1e-5)


def test_scale_one_never_calls_the_null_label():
    rows = counted("euler_maruyama", Guidance(1.0))
    assert len(rows) == 10
    assert all(y == [4, 5] for _, y in rows)


def test_guidance_channels():
    """Only the first two channels are extrapolated: v = c for label c, 0 for null."""

    def velocity(x, t, y):
        return jnp.ones_like(x) * jnp.where(y == 9, 0, y).reshape(-1, 1, 1, 1)

    x = sample(
        velocity, jnp.zeros((1, 1, 1, 3)), jnp.array([1]), null=9, method="euler",
        steps=4, transport=Transport(), noise=jnp.zeros,
        guidance=Guidance(3.0, channels=2),
    )  # fmt: skip
    np.testing.assert_allclose(x[0, 0, 0], [-3, -3, -1], rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_every_prediction_samples_a_point_mass(path, prediction):
    """Data at one point p: the exact network output leads every path there."""
    p = jnp.array([0.7, -0.4])
    transport = Transport(path, prediction)

    def velocity(x, t, y):
        alpha, sigma, _, _ = (c.reshape(-1, 1, 1, 1) for c in coefficients(path, t))
        output = jnp.broadcast_to(p, x.shape)
        if prediction == "noise":
            output = (x - alpha * p) / sigma
        return transport.velocity(output, x, t)

    x = sample(
        velocity, jax.random.normal(jax.random.key(0), (8, 1, 1, 2)),
        jnp.zeros(8, jnp.int32), null=0, method="heun", steps=200, transport=transport,
        noise=jnp.zeros,
    )  # fmt: skip
    np.testing.assert_allclose(x.reshape(8, 2), jnp.tile(p, (8, 1)), atol=0.05)
