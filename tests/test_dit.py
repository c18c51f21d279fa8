"""The network, its sizes and its parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.alignment.vae import LatentAlignment
from sra2_jax.attention import implementation
from sra2_jax.config import Model
from sra2_jax.config_align import AlignVAE
from sra2_jax.config_file import SIZES
from sra2_jax.models import shapes
from sra2_jax.models.dit import DiT


def count_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def make(**changes) -> DiT:
    fields = dict(size=8, channels=3, num_classes=5) | changes
    own = {k: fields.pop(k) for k in list(fields) if k not in DiT.__annotations__}
    own = dict(patch_size=2, width=16, depth=2, heads=2, remat="none") | own
    return DiT(Model(**own), **fields)


def inputs(model: DiT, batch: int = 2):
    x = jax.random.normal(jax.random.key(1), (batch, model.size, model.size, 3))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch)


def apply(model: DiT, params, *args, features=()):
    run = jax.jit(lambda p, *a: model.apply({"params": p}, *a, features))
    return run(params, *args)


def random_params(model: DiT):
    """All parameters random: zero-initialised layers would hide mistakes."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * draw(size=s.shape), jnp.float32),
        shapes(model, *inputs(model)),
    )


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 32.96), ("B", 130.50), ("L", 458.09), ("XL", 675.11)],
)
def test_parameter_counts(size, millions):
    """The published ones; the position table counts there, it is fixed."""
    width, depth, heads = SIZES[size]
    sizes = dict(width=width, depth=depth, heads=heads, num_classes=1000)
    model = make(size=32, channels=4, **sizes)
    x, t = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)
    count = count_parameters(shapes(model, x, t, t.astype(int)))
    assert round((count + 256 * width) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "layers", "final", "millions"),
    [
        ("B", 5, False, 8.29),
        ("XL", 5, False, 18.63),
        ("B", 2, False, 1.21),
        ("XL", 5, True, 18.6),
    ],
)
def test_head_parameter_counts(size, layers, final, millions):
    """The paper's 8M (B), 18M (XL) and 1M (two layers), as method.md derives them."""
    width = SIZES[size][0]
    section = AlignVAE(head_layers=layers, head_final_layer=final)
    network = DiT(Model(width, 12, 12), 32, 4, 1000)
    head = LatentAlignment(**vars(section)).head(network)
    count = count_parameters(
        shapes(head, jnp.zeros((1, 4, width)), jnp.zeros((1, width)))
    )
    assert abs(count / 1e6 - millions) < 0.06


def test_initial_state():
    """Output zero (adaLN-Zero); qkv is one xavier matrix, bound sqrt(6 / 4D)."""
    model = make(width=64, heads=4)
    params = jax.jit(model.init)(jax.random.key(0), *inputs(model))["params"]
    out, _, _ = jax.jit(model.apply)({"params": params}, *inputs(model))
    assert not out.any()
    bound = (6 / (4 * 64)) ** 0.5
    assert 0.98 * bound < jnp.abs(params["blocks"]["qkv"]["kernel"]).max() <= bound
    assert abs(params["label"]["embedding"].std() - 0.02) < 0.003
    assert abs(params["time_in"]["kernel"].std() - 0.02) < 0.001
    for layer in (params["blocks"]["modulation"], *params["final"].values()):
        assert not layer["kernel"].any()


def test_features_do_not_change_the_output_and_are_the_blocks_outputs():
    model = make()
    params = random_params(model)
    plain, none, _ = apply(model, params, *inputs(model))
    out, kept, _ = apply(model, params, *inputs(model), features=(1, 2))
    assert none == {}
    np.testing.assert_array_equal(plain, out)
    # A network cut after block 1 ends with the same tokens.
    cut = dict(params, blocks=jax.tree.map(lambda p: p[:1], params["blocks"]))
    _, first, _ = apply(make(depth=1), cut, *inputs(model), features=(1,))
    np.testing.assert_allclose(kept[1], first[1], rtol=1e-5, atol=1e-5)
    assert jnp.abs(kept[2] - kept[1]).max() > 0.1


def test_scan_remat_and_dtype_compute_the_same():
    params = random_params(make())

    def loss(params, **changes):
        model = make(**changes)
        out, kept, _ = model.apply({"params": params}, *inputs(model), (2,))
        return jnp.mean(out**2) + jnp.mean(kept[2] ** 2)

    def value_and_grad(**changes):
        return jax.jit(jax.value_and_grad(partial(loss, **changes)))(params)

    value, grad = value_and_grad()
    for changes in ({"remat": "attention"}, {"scan": False, "remat": "full"}):
        other, other_grad = value_and_grad(**changes)
        assert abs(value - other) < 1e-5 * value
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            grad,
            other_grad,
        )
    low = jax.jit(partial(loss, dtype=jnp.bfloat16))(params)
    assert 0 < abs(low - value) < 0.05 * value


def test_cudnn_forward_runs_once_where_its_output_is_kept(monkeypatch):
    """Traced only, no GPU: calls of cuDNN's attention in a gradient's program."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)

    def calls(remat):
        model = make(attention="cudnn", dtype=jnp.bfloat16, remat=remat)
        args = inputs(model)
        gradient = jax.grad(lambda p: model.apply({"params": p}, *args)[0].sum())
        text = str(jax.make_jaxpr(gradient)(shapes(model, *args)))
        names = (f"dot_product_attention_{part}_wrapper" for part in ("fwd", "bwd"))
        return [text.count(name) for name in names]

    assert calls("none") == calls("attention") == [1, 1]
    assert calls("dots") == [2, 1]


def test_attention_is_tried_before_it_is_relied_on(monkeypatch):
    """No cuDNN here: "auto" is XLA's quietly, "cudnn" with a warning. Where it works it
    is taken, also while a step is traced."""
    sizes = "bfloat16", 16, 2, 8
    assert implementation("auto", *sizes) == implementation("xla", *sizes) == "xla"
    with pytest.warns(UserWarning, match="XLA's is used"):
        assert implementation("cudnn", *sizes) == "xla"
    real = jax.nn.dot_product_attention
    working = lambda *qkv, implementation: real(*qkv)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", working)
    answers = []
    jax.jit(lambda: answers.append(implementation("cudnn", "bfloat16", 9, 1, 8)))()
    assert answers == ["cudnn"]
