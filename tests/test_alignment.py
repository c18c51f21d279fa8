import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.alignment.base import Alignment, MLPHead, elementwise, standardise


def test_smooth_l1_by_hand():
    d = jnp.array([[[0.01, -0.02, 0.05, 0.3, -1.0]]])
    expected = [0.0001 / 0.1, 0.0004 / 0.1, 0.025, 0.275, 0.975]
    ours = elementwise("smooth_l1", d, jnp.zeros_like(d), 0.05)
    np.testing.assert_allclose(ours[0, 0], expected, rtol=1e-5)


def test_cosine_is_over_channels_and_safe_at_zero():
    a = jnp.array([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    b = jnp.array([[[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]]])
    ours = elementwise("cosine", a, b, 0.0)
    np.testing.assert_allclose(ours[0], [0, 2, 1 - 0.5**0.5], atol=1e-6)
    tokens = elementwise("cosine_tokens", a, b, 0.0)  # one for each channel
    channels = [1 - 4 / 20**0.5, 1 + 2 / 5**0.5]
    np.testing.assert_allclose(tokens[0], channels, atol=1e-6)
    gradient = jax.grad(lambda x: elementwise("cosine", x, b, 0.0).sum())(a * 0)
    assert jnp.isfinite(gradient).all()


def test_a_head_of_one_layer_is_linear():
    x, c = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.zeros((2, 4))
    head = MLPHead((), 5)
    params = head.init(jax.random.key(1), x, c)
    apply = lambda x: head.apply(params, x, c)  # noqa: E731
    np.testing.assert_allclose(apply(3 * x), 3 * apply(x), rtol=1e-5)


def test_time_range_leaves_samples_out_of_the_sum_not_of_the_mean():
    prediction = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    t = jnp.array([0.1, 0.5, 0.6, 0.9])
    spec = Alignment(loss="l1", t_min=0.2, t_max=0.6)
    assert spec.loss_value(prediction, prediction * 0, t) == (2 + 3) / 4


def test_zscore():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4)) * 7 + 3
    z = standardise(x, 1, 2)
    np.testing.assert_allclose(z.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=(1, 2)), 1, rtol=1e-4)
    spec = Alignment(loss="l2", zscore=True)
    # invariant to scale and shift of either side
    assert spec.loss_value(x, 2 * x - 5, jnp.zeros(3)) < 1e-8
    assert spec.loss_value(x, -x, jnp.zeros(3)) > 3.9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.2, 0.2, 0.1, 0.0]),
        ("cosine", [0.2, 0.2, 0.1, 0.0]),
        ("exponential", [0.2, 0.2, 0.2 * 10**-0.5, 0.2 * 10**-3]),
    ],
)
def test_schedules(schedule, expected):
    """From step 100 over 10 steps, at steps 0, 100, 105 and 130."""
    spec = Alignment(
        weight=0.2, schedule=schedule, schedule_start=100, schedule_steps=10
    )
    weights = [float(spec.weight_at(jnp.asarray(s))) for s in (0, 100, 105, 130)]
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
