"""Samplers on fields known exactly; test_verify holds them to the golden files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.sampler import Guidance, guided, sample
from sra2_jax.transport import Transport, coefficients
from tests.test_transport import PATHS

MEANS = jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]])
SPREADS = jnp.array([0.3, 0.5, 0.4])
WEIGHTS = jnp.array([0.5, 0.3, 0.2])


def clean_mean(path, x, t):
    """E[x | x_t] of a Gaussian mixture, exact."""
    alpha, sigma, _, _ = (c.reshape(-1, 1, 1) for c in coefficients(path, t))
    variance = (alpha * SPREADS[:, None]) ** 2 + sigma**2
    offset = x.reshape(-1, 1, 2) - alpha * MEANS
    log = jnp.log(WEIGHTS) - jnp.sum(offset**2, -1) / (2 * variance[..., 0])
    posterior = jax.nn.softmax(log - jnp.log(variance[..., 0]), axis=-1)[..., None]
    gain = alpha * SPREADS[:, None] ** 2 / variance
    return jnp.sum(posterior * (MEANS + gain * offset), axis=1).reshape(x.shape)


def mixture_velocity(path):
    """The exact velocity E[alpha' x + sigma' eps | x_t] of a Gaussian mixture."""

    def velocity(x, t, y):
        alpha, sigma, d_alpha, d_sigma = (
            c.reshape(-1, 1, 1, 1) for c in coefficients(path, t)
        )
        clean = clean_mean(path, x, t)
        return d_alpha * clean + d_sigma * (x - alpha * clean) / sigma

    return velocity


@pytest.mark.parametrize("path", PATHS)
def test_guidance_by_a_coarser_model(path):
    """One that takes the mixture for its component 1, and predicts clean data: the
    field is its own plus scale times the difference, where it guides."""
    mean, spread, transport = MEANS[1], SPREADS[1], Transport(path)
    fine = mixture_velocity(path)

    def both(x, t, y):
        alpha, sigma, _, _ = (c.reshape(-1, 1, 1, 1) for c in coefficients(path, t))
        gain = alpha * spread**2 / ((alpha * spread) ** 2 + sigma**2)
        clean = mean + gain * (x - alpha * mean)
        return fine(x, t, y), transport.towards(clean, x, t)

    x = jax.random.normal(jax.random.key(0), (50, 1, 1, 2))
    y = jnp.zeros(50, jnp.int32)
    field = guided(both, y, 9, Guidance(), Guidance(1.7))
    for t in (0.02, 0.3, 0.9, 1.0):
        alpha, sigma, d_alpha, d_sigma = map(float, coefficients(path, jnp.asarray(t)))
        # x_t is Gaussian: its mean moves, and it is stretched as its deviation is.
        variance = (alpha * spread) ** 2 + sigma**2
        stretch = (alpha * d_alpha * spread**2 + sigma * d_sigma) / variance
        coarse = d_alpha * mean + stretch * (x - alpha * mean)
        v = fine(x, jnp.full(50, t), y)
        for on in (True, False):
            found = field(x, jnp.asarray(t), jnp.array([False, on]))
            expected = coarse + 1.7 * (v - coarse) if on else v
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["euler", "heun", "euler_maruyama"])
def test_gaussian_mixture(path, method):
    n = 20_000
    key = jax.random.key(3)

    @jax.jit
    def run(key):
        return sample(
            mixture_velocity(path),
            jax.random.normal(key, (n, 1, 1, 2)),
            jnp.zeros(n, jnp.int32),
            null=0,
            method=method,
            steps=100,
            transport=Transport(path),
            noise=lambda i: jax.random.normal(jax.random.fold_in(key, i), (n, 1, 1, 2)),
        )

    x = np.asarray(run(key)).reshape(n, 2)
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    cov = (WEIGHTS[:, None] * centred).T @ centred + WEIGHTS @ SPREADS**2 * jnp.eye(2)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(x.T), cov, atol=0.05)


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
