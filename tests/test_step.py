"""The jitted step against formulas of its own, and on 1 and 8 devices."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from sra2_jax import optimizer, sharding
from sra2_jax.config import Config, Latents, Optim
from sra2_jax.models.dit import patchify
from sra2_jax.step import Program


def program_of(config, devices=1):
    config = Config.of(config)
    return Program(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


def moved_parameters(program):
    """Those of step 0, moved away from their zeros; of numpy."""

    def moved(p):
        return p + 0.1 * np.cos(np.arange(p.size, dtype=p.dtype)).reshape(p.shape)

    return jax.tree.map(moved, jax.device_get(program.start().params))


def run(config, batches, devices=1):
    """The state at the start and after each step, the last in its place, and the
    metrics of each step."""
    program = program_of(config, devices)
    step, states, rows = program.compile(), [program.start()], []
    for batch in batches:
        rows_in = {k: batch[k] for k in program.batch}
        placed = jax.device_put(rows_in, sharding.batch_sharding(program.mesh))
        before = jax.device_get(states.pop())
        state, metrics = step(jax.device_put(before, program.places), placed)
        states += [before, state]
        rows.append({k: float(v) for k, v in metrics.items()})
    return states, rows


def assert_close(a, b, rtol=2e-4, atol=2e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def test_same_on_one_and_eight_devices_and_with_accumulation(tiny, batch):
    """Losses and parameters to float tolerance with all three alignments at once, by
    Muon and, where there is no matrix, Adam: data parallel, with a sharded state, split
    layers and two parts a step. State and moments are really sharded."""
    tiny.align.encoder.enabled = tiny.align.teacher.enabled = True
    tiny.optim.name = "muon"
    (*_, state), rows = run(tiny, 3 * [batch])
    assert rows[-1]["loss"] < rows[0]["loss"]
    tiny.mesh.fsdp = tiny.mesh.tensor = tiny.accumulate = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 100)
        (*_, other), other_rows = run(tiny, 3 * [batch], devices=8)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-4)
    # Adam divides by the root of tiny squares: compare where gradients are large
    assert_close(state.ema, other.ema, atol=2e-5)
    kernel = other.params["network"]["blocks"]["qkv"]["kernel"]
    local = kernel.addressable_shards[0].data.shape
    assert kernel.shape[0] == local[0] == 2  # never over the layer axis
    for kind, layers in (
        ("MuonState", ("qkv", "attention_out", "mlp_in", "mlp_out")),
        ("adamw", ("modulation",)),
    ):
        moment = optax.tree.get(
            other.opt_state,
            "mu",
            filtering=lambda path, _, kind=kind: kind in str(path),
        )
        for layer in layers:
            for tree in (moment, other.params):
                found = tree["network"]["blocks"][layer]["kernel"]
                assert 4 * found.addressable_shards[0].data.size == found.size


def test_loss_is_the_papers(tiny, batch):
    """L = mean (f - v)^2 + lambda mean smooth_l1(head(h) - z), from the draws."""
    tiny.align.vae.weight = 0.7
    program = program_of(tiny)
    network, heads = program.network, program.heads
    params = moved_parameters(program)
    draws = jax.jit(program.draw)(batch, jnp.asarray(5))
    total, metrics = jax.jit(program.loss)(params, None, {}, draws, jnp.asarray(5))

    z, t = np.asarray(draws["latent_sample"]), np.asarray(draws["t"])
    t4 = t.reshape(-1, 1, 1, 1)
    noise = (draws["x_t"] - (1 - t4) * z) / t4
    np.testing.assert_allclose(draws["target"], noise - z, rtol=1e-3, atol=1e-3)
    inputs = draws["x_t"], draws["t"], draws["y"]
    apply = jax.jit(network.apply, static_argnums=4)
    out, kept, c = apply({"params": params["network"]}, *inputs, (1,))
    head = jax.jit(heads["vae"].apply)({"params": params["heads"]["vae"]}, kept[1], c)
    denoise = np.mean((np.asarray(out) - np.asarray(draws["target"])) ** 2)
    d = np.abs(np.asarray(head) - np.asarray(patchify(jnp.asarray(z), 1)))
    align = np.mean(np.where(d < 0.05, d**2 / 0.1, d - 0.025))
    assert float(total) == pytest.approx(denoise + 0.7 * align, rel=1e-5)
    assert float(metrics["loss_align_vae"]) == pytest.approx(align, rel=1e-5)


def test_draws(tiny, batch):
    """Latents are scale * (mean - shift + std * n); labels dropped at their rate."""
    tiny.latents.scaling_factor, tiny.latents.shift_factor = 0.5, 0.25
    big = {k: np.tile(v, (500,) + (1,) * (v.ndim - 1)) for k, v in batch.items()}
    draw = jax.jit(program_of(tiny).draw)
    draws = draw(big, jnp.asarray(0))
    mean, std = (big[k].astype(np.float32) for k in ("mean", "std"))
    normal = (draws["latent_sample"] / 0.5 + 0.25 - mean) / std
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    dropped = np.asarray(draws["y"]) == 10
    assert abs(dropped.mean() - 0.1) < 0.012
    np.testing.assert_array_equal(draws["y"][~dropped], big["label"][~dropped])
    again = draw(big, jnp.asarray(1))
    assert not np.array_equal(draws["t"], again["t"])


def test_latents_normalised_by_channel(tiny, batch, golden):
    """scaling (raw - mean) / std, as LightningDiT's code has it; and back."""
    data = dict(np.load(golden / "ldm_vae.npz"))
    mean, std = (tuple(data[f"channel_{k}"].tolist()) for k in ("mean", "std"))
    latents = Latents(
        channels=6, scaling_factor=float(data["multiplier"]), mean=mean, std=std
    )
    raw = np.moveaxis(data["mean"], 1, -1)
    expected = np.moveaxis(data["mean_normalised"], 1, -1)
    scaled = latents.scale * (raw - latents.shift)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-5)
    tiny.latents.scaling_factor, tiny.latents.shift_factor = 0.5, 0.25
    tiny.latents.mean, tiny.latents.std = (0.0, 1.0, -2.0, 3.0), (1.0, 2.0, 0.5, 4.0)
    tiny.align.vae.target = "mean"
    draws = jax.jit(program_of(tiny).draw)(batch, jnp.asarray(0))
    ours = batch["mean"].astype(np.float32) - 0.25 - np.array([0, 1, -2, 3])
    expected = 0.5 * ours / np.array([1, 2, 0.5, 4])
    np.testing.assert_allclose(draws["latent_mean"], expected, rtol=1e-5, atol=1e-6)


def test_first_update_and_what_is_not_finite(tiny, batch):
    """Adam's first step is rate * sign(gradient), while the rate warms up; the EMA is
    d old + (1 - d) new, for each d. Infinite latents, at steps 2 and 3: parameters, EMA
    and optimizer stay, and the run goes on from them."""
    tiny.optim.warmup_steps, tiny.optim.clip_norm = 4, 1e-3
    tiny.ema_decay, tiny.ema_others = 0.75, (0.5,)
    bad = batch | {"mean": batch["mean"].copy()}
    bad["mean"][3, 1, 1, 1] = np.inf
    (start, state, _, skipped, after), rows = run(tiny, [batch, bad, bad, batch])
    move = jax.tree.map(lambda a, b: np.abs(a - b), state.params, start.params)
    assert rows[0]["learning_rate"] == pytest.approx(tiny.optim.learning_rate / 4)
    largest = max(m.max() for m in jax.tree.leaves(move))
    assert largest == pytest.approx(tiny.optim.learning_rate / 4, rel=1e-3)
    own = {name: state.ema[name] for name in state.params}
    for d, average in ((0.75, own), (0.5, state.ema["0.5"])):
        expected = jax.tree.map(
            lambda a, b, d=d: d * a + (1 - d) * b, start.params, state.params
        )
        assert_close(average, expected, rtol=1e-6, atol=1e-8)
    row = rows[0]
    ratio = row["loss_align_vae"] / row["loss_denoise"]
    assert row["ratio_align_vae"] == pytest.approx(ratio)
    assert row["grad_norm"] > 0.01  # before the clip
    assert int(state.step) == 1
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0]
    assert not np.isfinite(rows[1]["loss_denoise"])
    assert int(skipped.step) == 3
    jax.tree.map(np.testing.assert_array_equal, state, skipped.replace(step=state.step))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, skipped.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_clip_and_weight_decay():
    """Both act: a tiny clip leaves Adam's eps to damp; decay shrinks weights."""
    made = optimizer.optimizer(
        Optim(learning_rate=1e-3, clip_norm=1e-8, weight_decay=100.0)
    )
    params = {"kernel": jnp.arange(1.0, 5.0)}
    updates, _ = made.update({"kernel": jnp.ones(4)}, made.init(params), params)
    moved = updates["kernel"] + 100 * 1e-3 * params["kernel"]
    assert 0.2e-3 < np.abs(moved).max() < 0.6e-3


@pytest.mark.parametrize(
    ("decay", "halfway"), [("linear", 0.25), ("cosine", 0.5 * (1 - 0.5**0.5))]
)
def test_decay_of_the_rate(tiny, decay, halfway):
    """From step 100 over 40 steps, here 3/4 of the way; after a warm-up of 10."""
    tiny.optim.update(learning_rate=2.0, warmup_steps=10, decay=decay)
    tiny.optim.update(decay_start=100, decay_steps=40)
    schedule = optimizer.schedule(Config.of(tiny).optim)
    rates = [float(schedule(step)) for step in (0, 4, 9, 100, 130, 140, 999)]
    expected = [0.2, 1.0, 2.0, 2.0, 2.0 * halfway, 0.0, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


def test_muon_is_the_librarys_on_each_matrix_by_itself(tiny):
    """Stacked blocks; queries, keys and values, and SwiGLU's halves in one matrix;
    AdamW moves the rest."""
    tiny.model.mlp = "swiglu"
    tiny.optim.update(name="muon", learning_rate=0.1, weight_decay=0.3, clip_norm=1e9)
    program, draw = program_of(tiny), np.random.default_rng(0)

    def drawn():
        return jax.tree.map(
            lambda x: draw.normal(size=x.shape).astype("f4"), program.abstract.params
        )

    parts = {"qkv": 3, "attention_out": 1, "gated_in": 2, "gated_out": 1}

    def apart(tree):
        """(matrices, all else), of the library's own rule: what has two axes."""
        blocks = tree["network"]["blocks"]
        kernels = {name: blocks[name]["kernel"] for name in parts}
        matrices = {
            (name, i): list(np.split(kernels[name][i], n, axis=1))
            for name, n in parts.items()
            for i in range(2)
        }
        rest = {k: v for k, v in tree["network"].items() if k != "blocks"}
        more = {k: v for k, v in blocks.items() if k not in parts}
        biases = {name: blocks[name]["bias"] for name in parts}
        return matrices, [rest, more, biases, tree["heads"]]

    params, decay = drawn(), {"weight_decay": 0.3}
    libraries = muon(0.1, **decay, consistent_rms=0.2), optax.adamw(0.1, **decay)
    states = [o.init(p) for o, p in zip(libraries, apart(params), strict=True)]
    state, update = program.optimizer.init(params), jax.jit(program.optimizer.update)
    updates = [jax.jit(library.update) for library in libraries]
    for _ in range(2):
        grads = drawn()
        ours, state = update(grads, state, params)
        both = zip(updates, apart(grads), states, apart(params), strict=True)
        theirs, states = zip(*(u(g, s, p) for u, g, s, p in both), strict=True)
        assert_close(apart(jax.device_get(ours)), theirs)
        params = jax.device_get(optax.apply_updates(params, ours))


# Choices of config.py in the jitted step, many at a time; see also test_dit,
# test_alignment and test_methods.
VARIANTS = [
    {
        "transport.path": "gvp",
        "transport.prediction": "data",
        "transport.time_shift": 2.0,
        "align.vae.loss": "l1",
        "align.vae.target": "mean",
        "align.vae.zscore": True,
        "align.vae.schedule": "exponential",
        "align.vae.t_max": 0.5,
        "align.vae.head_layers": 1,
        "align.vae.depth": 2,
        "model.patch_size": 2,
        "model.norm": "rms",
        "model.qk_norm": "rms",
        "model.mlp": "swiglu",
        "model.rope": True,
        "model.shift": False,
        "model.remat": "full",
    },
    {
        "transport.path": "vp",
        "transport.prediction": "noise",
        "transport.time": "lognormal",
        "align.vae.loss": "cosine_tokens",
        "align.vae.schedule": "cosine",
        "align.vae.head_final_layer": True,
        "align.vae.head_layers": 3,
        "label_dropout": 1.0,
        "model.qk_norm": "layer",
        "model.remat": "attention",
        "model.dtype": "bfloat16",
    },
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_variants_train(tiny, batch, changes):
    """Ten steps on one batch bring the denoising loss down; values stay finite."""
    tiny.update_from_flattened_dict(changes)
    tiny.optim.learning_rate = 1e-2
    (*_, state), rows = run(tiny, 10 * [batch])
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    first, last = (np.mean([r["loss"] for r in part]) for part in (rows[:3], rows[-3:]))
    assert last < first
    leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
    assert {leaf.dtype.name for leaf in leaves} <= {"float32", "int32"}


def test_first_steps_are_the_stored_ones(tiny, batch):
    """For refactors: a change of these numbers must be meant, and said."""
    stored = json.loads((Path(__file__).parent / "first_steps.json").read_text())
    _, rows = run(tiny, len(stored) * [batch])
    for row, expected in zip(rows, stored, strict=True):
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-4)
