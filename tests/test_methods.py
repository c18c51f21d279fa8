"""Vanilla, SRA 2, Internal Guidance, REPA, iREPA and SRA through the one step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from sra2_jax.alignment.base import Alignment, MLPHead, elementwise, standardise
from sra2_jax.config import Config
from sra2_jax.config_file import INTERNAL_GUIDANCE
from sra2_jax.data.digits import load_digits
from sra2_jax.data.order import Order
from sra2_jax.data.pipeline import batches
from sra2_jax.data.pixels import to_png
from sra2_jax.models import apply
from sra2_jax.models.dinov2 import patch_features
from sra2_jax.runtime import Watch
from sra2_jax.train import prepare, train
from sra2_jax.weights import load_dinov2
from tests.conftest import one_line
from tests.test_step import moved_parameters, program_of

METHODS = {
    "vanilla": (),
    "Internal Guidance": ("vae",),
    "all others": ("encoder", "irepa", "teacher", "vae"),
}


def switch(config, on):
    for name, section in config.align.items():
        section.enabled = name in on
    return config


@pytest.fixture(scope="module")
def digits(latents):
    """The first 20 batches of 64 real digits with their images and features."""
    order = Order(64, seed=0, shuffle_buffer=2048)
    stream = batches(latents, order, fields=("image", "features"))
    rows = [next(stream) for _ in range(20)]
    for row in rows:
        row.pop("index")
    return rows


@pytest.mark.parametrize("name", METHODS)
def test_trains_on_digits(tiny, digits, name):
    """Every loss falls, every head that is on moves, no other head exists."""
    on = METHODS[name]
    config = switch(tiny, on)
    if name == "Internal Guidance":
        config.align.vae.update(INTERNAL_GUIDANCE)
    config.batch_size, config.optim.learning_rate, config.ema_decay = 64, 4e-3, 0.9
    config.align.irepa.source = "features"  # REPA runs the encoder in each step
    program = program_of(config)
    state, step = program.start(), program.compile()
    first = jax.device_get(state.params["heads"])
    assert set(first) == set(on)
    rows = []
    for number in range(30):
        state, metrics = step(state, digits[number % len(digits)])
        rows.append({k: float(v) for k, v in metrics.items()})
    assert {k[11:] for k in rows[0] if k.startswith("loss_align_")} == set(on)
    for key in ("loss", "loss_denoise", *(f"loss_align_{n}" for n in on)):
        before, after = (
            np.mean([r[key] for r in part]) for part in (rows[:5], rows[-5:])
        )
        # the teacher's features grow while the student learns to follow them
        if key not in ("loss_align_teacher", "loss") or "teacher" not in on:
            assert after < 0.97 * before, key
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), first, jax.device_get(state.params["heads"])
    )
    assert all(m > 1e-3 for m in jax.tree.leaves(moved))


def test_teacher_is_the_ema_at_a_lower_noise_level(tiny, batch):
    """SRA's loss and its gradient from a full forward pass of the EMA network, as it
    was before the step."""
    switch(tiny, ("teacher",))
    tiny.model.depth, tiny.align.teacher.interval = 3, 0.3
    program = program_of(tiny)
    network, params = program.network, moved_parameters(program)
    ema = jax.tree.map(lambda p: 0.9 * p, params["network"])
    step = jnp.asarray(7)
    draws = jax.jit(program.draw)(batch, step)

    t, t_teacher = np.asarray(draws["t"]), np.asarray(draws["t_teacher"])
    assert (t_teacher <= t).all()
    assert (t_teacher >= np.maximum(t - 0.3, 0)).all()
    assert len(np.unique(t - t_teacher)) == len(t)  # drawn for each sample
    # x = (1 - t) z + t n and dx/dt = n - z, the target: both sides give z and n
    t4, v = t.reshape(-1, 1, 1, 1), np.asarray(draws["target"])
    clean = np.asarray(draws["x_t"]) - t4 * v
    expected = clean + t_teacher.reshape(-1, 1, 1, 1) * v
    np.testing.assert_allclose(draws["x_teacher"], expected, atol=1e-5)

    def formula(params):
        seen = draws["x_teacher"], draws["t_teacher"], draws["y"]
        _, kept, _ = apply(network, ema, *seen, (2,))
        target = kept[2]
        inputs = draws["x_t"], draws["t"], draws["y"]
        out, kept, c = apply(network, params["network"], *inputs, (1,))
        head = apply(program.heads["teacher"], params["heads"]["teacher"], kept[1], c)
        d = jnp.abs(head - target)
        align = jnp.mean(jnp.where(d < 0.05, d**2 / 0.1, d - 0.025))
        return jnp.mean((out - v) ** 2) + 0.2 * align, align

    @jax.jit
    def expected(params):
        found, gradient = jax.value_and_grad(formula, has_aux=True)(params)
        return *found, optax.tree.norm(gradient)

    expected = expected(params)
    averages = {"network": ema, "heads": params["heads"]}
    state = program.start().replace(step=step, params=params, ema=averages)
    _, metrics = program.compile()(state, batch)
    found = [metrics[name] for name in ("loss", "loss_align_teacher", "grad_norm")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_repa_and_irepa_by_hand(tiny, digits):
    """REPA: 1 - mean cos(head(h), encoder(image)) over channels, weight 0.5. iREPA, of
    stored features: each channel of each image has mean 0 and deviation 1 over the
    tokens; the head is a 3x3 convolution, padded with zeros, over the grid of tokens;
    weight 1."""
    switch(tiny, ("encoder", "irepa"))
    tiny.align.irepa.source = "features"
    program = program_of(tiny)
    params = moved_parameters(program)
    batch = {k: jnp.asarray(v[:16]) for k, v in digits[0].items()}
    draws = jax.jit(program.draw)(batch, jnp.asarray(0))
    assert {"image", "features"} & draws.keys() == set(program.fields)
    total, metrics = jax.jit(program.loss)(
        params, None, program.load_frozen(), draws, jnp.asarray(0)
    )
    encoder, encoder_params = load_dinov2("digits")
    features = jax.jit(patch_features, static_argnums=(0, 3))
    z = features(encoder, encoder_params, batch["image"], 4)
    inputs = draws["x_t"], draws["t"], draws["y"]
    run = jax.jit(apply, static_argnums=(0, 5))
    _, kept, c = run(program.network, params["network"], *inputs, (1,))
    h = apply(program.heads["encoder"], params["heads"]["encoder"], kept[1], c)

    def distance(a, b):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return 1 - (np.asarray(a * b).sum(-1) / norms).mean()

    repa = float(metrics["loss_align_encoder"])
    assert repa == pytest.approx(distance(h, z), rel=1e-4)

    z = np.asarray(z)
    z = (z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, keepdims=True)
    x = np.pad(
        np.asarray(kept[1]).reshape(16, 4, 4, 16), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    conv = jax.device_get(params["heads"]["irepa"]["conv"])
    h = conv["bias"] + sum(
        x[:, i : i + 4, j : j + 4] @ conv["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    irepa = float(metrics["loss_align_irepa"])
    # Stored features are rounded to float16.
    assert irepa == pytest.approx(distance(h.reshape(16, 16, 64), z), rel=1e-3)
    parts = float(metrics["loss_denoise"]) + 0.5 * repa + irepa
    assert float(total) == pytest.approx(parts, rel=1e-6)


def test_what_is_off_costs_nothing(tiny, batch):
    """Counted by XLA: blocks after the teacher's never run, others add nothing."""
    tiny.model.depth, tiny.model.scan = 3, False
    tiny.align.encoder.model = "nowhere"

    def flops(on, teacher_depth=1):
        switch(tiny, on)
        tiny.align.teacher.teacher_depth = teacher_depth
        program = program_of(tiny)
        params = program.abstract.params

        def forward(params, batch):
            draws = program.draw(batch, jnp.asarray(0))
            ema = params["network"]
            return program.loss(params, ema, {}, draws, jnp.asarray(0))

        return jax.jit(forward).lower(params, batch).cost_analysis()["flops"]

    vanilla, *sra = [flops(())] + [flops(("teacher",), n) for n in (1, 3)]
    block = (sra[1] - sra[0]) / 2
    assert 2 * block < vanilla < 5 * block
    assert vanilla < sra[0] < vanilla + 3 * block


def test_the_job_encodes_what_the_method_needs(tiny, tmp_path):
    switch(tiny, ("encoder", "vae"))
    tiny.align.encoder.source = "features"
    tiny.data.num_classes, tiny.data.images = 2, str(tmp_path / "images")
    tiny.eval.features = ""
    for i, image in enumerate(load_digits("test")[0][:16]):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(image))
    program, folder = program_of(tiny), epath.Path(tmp_path / "latents")
    prepare(program.config, folder, program.fields, Watch())
    batch = next(batches(folder, Order(16, 0, 16), fields=program.fields))
    wanted = {name: (x.shape, x.dtype) for name, x in program.batch.items()}
    assert {name: (batch[name].shape, batch[name].dtype) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"align.encoder.width": 48},
            "digits has tokens of width 64: set config.align.",
        ),
        (
            {"align.encoder.source": "features", "align.encoder.width": 48},
            "align.encoder.width=48",
        ),
        (
            {"align.encoder.source": "features", "align.encoder.model": "elsewhere"},
            "align.encoder.model=elsewhere",
        ),
        ({"align.encoder.model": "/nowhere"}, "/nowhere"),
    ],
)
@pytest.mark.usefixtures("blind")
def test_refusals(tiny, latents, tmp_path, changes, message):
    switch(tiny, ("encoder",)).data.dir = str(latents)
    tiny.update_from_flattened_dict(changes)
    with one_line(message):
        train(Config.of(tiny), str(tmp_path / "run"))


def test_a_dataset_of_latents_alone(tiny, latents, tmp_path):
    """Refused before anything is compiled."""
    fields = json.loads((latents / "latents.json").read_text())
    fields |= {"images": False, "features": None}
    (tmp_path / "latents.json").write_text(json.dumps(fields))
    switch(tiny, ("encoder",)).data.dir = str(tmp_path)
    for source, flag in (("images", "--store_images"), ("features", "--encoder")):
        tiny.align.encoder.source = source
        with one_line(f"encode again with {flag}"):
            train(Config.of(tiny), str(tmp_path / "run"))


# Parts of the loss


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
