"""Names and layouts of the reference code's state dicts, both ways."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.programs.verify import network_of
from sra2_jax.weights.sit import from_reference, reverse_time, to_reference
from tests.conftest import one_line
from tests.test_step import program_of


def golden_weights(golden, name):
    data = np.load(golden / f"{name}.npz")
    return {k[2:]: data[k] for k in data if k.startswith("w/")}


def golden_network(golden, name):
    """That of a golden file of SiT's or LightningDiT's code."""
    return network_of(np.load(golden / f"{name}.npz"))[0]


def read(weights, config, **how):
    """`from_reference` with the network and the heads of a config."""
    program = program_of(config)
    heads = program.abstract.params["heads"]
    return from_reference(weights, program.network, heads, HEAD_NAMES, **how)


def random_weights(config, seed):
    """A state dict of the config's network and heads, no number like another."""
    program = program_of(config)
    draw = np.random.default_rng(seed)
    made = jax.tree.map(
        lambda s: draw.normal(size=s.shape).astype(np.float32), program.abstract.params
    )
    return to_reference(made["network"], made["heads"], HEAD_NAMES, program.network)


def assert_same(ours, reference):
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_array_equal(ours[name], tensor.astype(np.float32), name)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("layers", [1, 4])
def test_heads_of_any_shape_round_trip(final, layers, tiny):
    for name, section in tiny.align.items():
        section.enabled = True
        if name != "irepa":  # a convolution
            section.head_layers, section.head_final_layer = layers, final
    weights = random_weights(tiny, 0)
    params, heads = read(weights, tiny)
    assert heads.keys() == {"vae", "encoder", "irepa", "teacher"}
    network = program_of(tiny).network
    assert_same(to_reference(params, heads, HEAD_NAMES, network), weights)
    alone = "final_layer_xr.linear.weight" in weights  # as Internal Guidance's code
    assert alone == (final and layers == 1)
    tokens, c = jnp.ones((1, 16, 16)), jnp.ones((1, 16))
    for name, head in program_of(tiny).heads.items():
        head.apply({"params": heads[name]}, tokens, c)


LIGHTNING = ("full", "wo_shift", "qknorm_layernorm", "rope_only")
GOLDEN = ("sit", "repa_sit", "sra_sit", *(f"lightning_{name}" for name in LIGHTNING))
HEADS = {"repa_sit": {"encoder": {}}, "sra_sit": {"teacher": {}}}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_round_trip(golden, name):
    """Out again as they came in, but for heads, which nothing wants here; outputs and
    gradients are test_verify's."""
    weights = golden_weights(golden, name)
    network = golden_network(golden, name)
    params, heads = from_reference(weights, network, {}, HEAD_NAMES)
    assert heads == HEADS.get(name, {})
    apart = ("projectors.", "ap_head.")
    weights = {k: v for k, v in weights.items() if not k.startswith(apart)}
    again = to_reference(params, {}, HEAD_NAMES, network)
    for table in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        if table in weights:
            np.testing.assert_allclose(again.pop(table), weights.pop(table), atol=1e-6)
    assert_same(again, weights)
    if network.model.rope:
        other = golden_weights(golden, name)
        other["feat_rope.freqs_cos"] = other["feat_rope.freqs_cos"] ** 2
        with one_line("freqs_cos is not the fixed table"):
            from_reference(other, network, {}, HEAD_NAMES)


def test_other_files_of_the_same_network(tiny):
    """REPA's decoder_blocks are the blocks after the aligned one; EMAs of the reference
    code hold a position table off by rounding."""
    weights = random_weights(tiny, 0)
    older = {k.replace("blocks.1.", "decoder_blocks.0."): v for k, v in weights.items()}
    drifted = weights | {"pos_embed": weights["pos_embed"] * np.float32(1 + 2e-4)}
    wrapped = {f"module.{k}": v for k, v in weights.items()}
    bare = {k: v for k, v in weights.items() if k != "pos_embed"}
    for file in (older, drifted, wrapped, bare):
        params, heads = read(file, tiny)
        again = to_reference(params, heads, HEAD_NAMES, program_of(tiny).network)
        assert_same(again, weights)


def test_reverse_time(golden):
    """Computes -f(x, 1 - t); twice it is the same network again."""
    data = np.load(golden / "sit.npz")
    model = golden_network(golden, "sit")
    model = model.clone(model=replace(model.model, time_scale=2.0))
    params, heads = from_reference(golden_weights(golden, "sit"), model, {}, HEAD_NAMES)
    assert heads == {}
    x, t, y = np.moveaxis(data["x"], 1, -1), data["t"], data["y"]
    apply = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs)[0])
    expected = apply(params, x, t, y)
    turned = reverse_time(params, 2.0, velocity=True)
    error = np.abs(apply(turned, x, 1 - t, y) + expected).max()
    assert error < 1e-5 * np.abs(expected).max()
    again = reverse_time(turned, 2.0, velocity=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, again
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"a": w["pos_embed"]}, "no SiT of this config .*no such tensor"),
        (
            lambda w: w | {"pos_embed": w["pos_embed"][:, :5]},
            "pos_embed is not the fix",
        ),
        (lambda w: w | {"module.pos_embed": w["pos_embed"]}, "tensor under several"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tiny):
    with one_line(match=message):
        read(change(random_weights(tiny, 0)), tiny)
