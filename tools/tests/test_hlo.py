"""Counts of compiled programs: written by hand, and of functions of known cost."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tools import hlo

# As a TPU's compiler writes: a loop over range(1, 14, 2) that does not say so, S(1) for
# the core's own memory, one gather spread over two fusions.
LOOP = """
HloModule jit_step, is_scheduled=true

%slice (param_0: f32[7,64], param_1: s32[]) -> f32[64] {
  %param_1 = s32[]{:T(128)} parameter(1)
  %param_0 = f32[7,64]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %cut = f32[1,64]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero)
  ROOT %flat = f32[64]{0:T(128)} bitcast(%cut)
}

%start (param_0.1: bf16[4,64]) -> (bf16[4,64], bf16[32,64]) {
  %param_0.1 = bf16[4,64]{1,0} parameter(0)
  %gather.1 = bf16[32,64]{1,0} all-gather(%param_0.1), channel_id=9, dimensions={0}
  ROOT %both = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) tuple(%param_0.1, %gather.1)
}

%finish (param_0.2: bf16[4,64], param_1.2: bf16[4,16]) -> bf16[64,16] {
  %param_0.2 = bf16[4,64]{1,0} parameter(0)
  %param_1.2 = bf16[4,16]{1,0} parameter(1)
  %gather.2 = bf16[32,64]{1,0} all-gather(%param_0.2), channel_id=9, dimensions={0}
  ROOT %dot.2 = bf16[64,16]{1,0} dot(%param_0.2, %param_1.2), \
lhs_contracting_dims={0}, rhs_contracting_dims={0}, metadata={op_name="BTNH,BSNH->BNTS"}
}

%body (loop: (s32[], f32[7,64], bf16[4,64], bf16[4,16])) -> (s32[], f32[7,64]) {
  %loop = (s32[], f32[7,64]{1,0}, bf16[4,64]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %rows = f32[7,64]{1,0} get-tuple-element(%loop), index=1
  %part = bf16[4,64]{1,0} get-tuple-element(%loop), index=2
  %other = bf16[4,16]{1,0} get-tuple-element(%loop), index=3
  %row = f32[64]{0:T(128)S(1)} fusion(%rows, %i), kind=kLoop, calls=%slice
  %async = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) fusion(%part), calls=%start
  %product = bf16[64,16]{1,0} fusion(%part, %other), calls=%finish
  %ahead = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%row)
  %there = f32[64]{0:S(1)} copy-done(%ahead)
  %two = s32[] constant(2)
  %i.next = s32[] add(%i, %two)
  ROOT %next = (s32[], f32[7,64]{1,0}) tuple(%i.next, %rows)
}

%condition (loop.1: (s32[], f32[7,64])) -> pred[] {
  %loop.1 = (s32[], f32[7,64]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(14)
  %now = s32[] get-tuple-element(%loop.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%now, %end), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

ENTRY %main (x: f32[7,64], y: bf16[10]) -> f32[7,64] {
  %x = f32[7,64]{1,0} parameter(0)
  %y = bf16[10]{0} parameter(1)
  %one = s32[] constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %begin = (s32[], f32[7,64]{1,0}) tuple(%first, %x)
  %while = (s32[], f32[7,64]{1,0}) while(%begin), condition=%condition, body=%body
  %mean = (f32[7,64]{1,0}, /*index=1*/bf16[10]{0}) all-reduce(%x, %y), \
channel_id=3, to_apply=%sum
  %space = f32[9]{0} custom-call(), custom_call_target="AllocateBuffer"
  %call = f32[3]{0} custom-call(%y), custom_call_target="Other"
  ROOT %result = f32[7,64]{1,0} get-tuple-element(%while), index=1
}
"""


def test_loop_of_a_tpu():
    counts = hlo.count(LOOP)
    assert not counts.unknown_loops
    assert counts.matmuls == counts.attention_matmuls == 7
    assert counts.matmul_flops == 7 * 2 * 64 * 16 * 4
    assert dict(counts.collectives) == {
        ("all-gather", "bf16"): 7,  # not 14
        ("all-reduce", "f32"): 1,
        ("all-reduce", "bf16"): 1,
    }
    assert counts.collective_bytes["all-gather", "bf16"] == 7 * 32 * 64 * 2
    assert counts.collective_bytes["all-reduce", "f32"] == 7 * 64 * 4
    assert dict(counts.custom_calls) == {"Other": 1}
    assert counts.traffic == {
        # One row and its number, not seven rows; and the loop's own sum.
        "elementwise": 7 * (64 * 4 + 4 + 12),
        "matmul": 7 * 2 * (4 * 64 + 4 * 16 + 64 * 16),
        "copy": 7 * 64 * 4 + 8,  # the side in the core costs nothing
        "custom": 10 * 2 + 3 * 4,
        "collective": 7 * 2 * (4 * 64 + 32 * 64) + 2 * (7 * 64 * 4 + 10 * 2),
    }


def test_libraries_of_a_gpu():
    """cuBLAS and cuDNN's attention, forward and backward; workspaces do not count."""
    text = """
ENTRY %main (x: bf16[6,10], w: bf16[10,5], q: bf16[2,8,3,4]) -> bf16[6,5] {
  %x = bf16[6,10]{1,0} parameter(0)
  %w = bf16[10,5]{1,0} parameter(1)
  %q = bf16[2,8,3,4]{3,2,1,0} parameter(2)
  %gemm = (bf16[6,5]{1,0}, s8[33554432]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %fwd = (bf16[2,3,8,4]{3,1,2,0}, f32[2,3,8]{2,1,0}, u8[0]{0}) \
custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %bwd = (bf16[2,3,8,4]{3,1,2,0}, bf16[2,3,8,4]{3,1,2,0}, bf16[2,3,8,4]{3,1,2,0}) \
custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %result = bf16[6,5]{1,0} get-tuple-element(%gemm), index=0
}
"""
    counts = hlo.count(text)
    one = 2 * 2 * 3 * 8 * 8 * 4  # of attention's products
    assert counts.products == [
        (2 * 6 * 5 * 10, 2 * (60 + 50 + 30), 1),
        (2 * one, 4 * 192 * 2 + 48 * 4, 1),
        (5 * one, 6 * 192 * 2, 1),
    ]
    assert (counts.matmuls, counts.attention_matmuls) == (3, 2)
    assert counts.custom_calls["__cublas$lt$matmul"] == 1
    assert set(counts.traffic) == {"matmul"}


def test_convolution_counts_only_places_on_the_input():
    """16 attention heads as a TPU writes them: a window of 16 over an input dilated by
    16 meets each head once; and a padded 3-wide one misses two corners."""
    text = """
ENTRY %main (q: bf16[16,8,72], k: bf16[16,72,8]) -> bf16[16,8,8] {
  %q = bf16[16,8,72]{2,1,0} parameter(0)
  %k = bf16[16,72,8]{2,1,0} parameter(1)
  %scores = bf16[16,8,8]{2,1,0} convolution(%q, %k), \
window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf
  ROOT %wide = bf16[16,8,8]{2,1,0} convolution(%q, %k), \
window={size=3 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""
    heads, wide = (flops for flops, _, _ in hlo.count(text).products)
    assert heads == 2 * 16 * 8 * 8 * 72
    assert wide == 2 * (3 * 16 - 2) * 8 * 8 * 72


def test_loop_of_unknown_length_is_named():
    text = LOOP.replace("direction=LT", "direction=NE")
    assert hlo.count(text).unknown_loops == ["while"]
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.count("HloModule nothing")


def compiled(function, *shapes, out=None, **options):
    """Counts of a function on 8 devices; of each shape the axis "x" is split."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))

    def place(spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec))
        for shape, spec in shapes
    ]
    jitted = jax.jit(function, out_shardings=place(out or ()), **options)
    return hlo.count(jitted.lower(*arguments).compile().as_text())


def test_scan_of_matmuls_with_gathered_weights():
    def chain(w, x):
        return jax.lax.scan(lambda h, m: (jnp.tanh(h @ m), None), x, w)[0]

    weights, x = ((5, 64, 64), (None, "x")), ((32, 64), ("x",))
    counts = compiled(chain, weights, x, out=("x",))
    assert counts.matmuls == 5
    assert counts.matmul_flops == 5 * 2 * 4 * 64 * 64
    assert dict(counts.collectives) == {("all-gather", "f32"): 5}
    assert counts.collective_bytes["all-gather", "f32"] == 5 * 64 * 64 * 4
    assert not counts.unknown_loops


def test_gradient_is_reduced_once():
    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)

    counts = compiled(gradient, ((64, 16), ()), ((32, 64), ("x",)))
    assert counts.matmuls == 2
    assert dict(counts.collectives) == {("all-reduce", "f32"): 1}
    assert counts.collective_bytes["all-reduce", "f32"] == 64 * 16 * 4


def test_elementwise_bytes():
    vector = (1000,), ()
    counts = compiled(lambda a, b: a * b + 1, vector, vector)
    assert counts.traffic == {"elementwise": 3 * 4000}
    # Written over in place: the row is read and written, the table is not touched.
    counts = compiled(
        lambda a, b: jax.lax.dynamic_update_slice(a, b, (3, 0)),
        ((1000, 10), ()),
        ((1, 10), ()),
        donate_argnums=0,
    )
    # Newer versions read the place, two numbers, from memory.
    assert counts.traffic["elementwise"] in (2 * 40, 2 * 40 + 8)


# As jax 0.11.2 writes for a GPU: cuBLAS's call in a fusion with the slice before it,
# the second result of a fusion as %pair#1.
SLICED = """
HloModule jit_step, is_scheduled=true

%sliced (p0: bf16[28,16,32], p1: bf16[64,32]) -> (bf16[64,16], s8[4096]) {
  %p1 = bf16[64,32]{1,0} parameter(1)
  %p0 = bf16[28,16,32]{2,1,0} parameter(0)
  %cut = bf16[1,16,32]{2,1,0} slice(%p0), slice={[26:27], [0:16], [0:32]}
  %flat = bf16[16,32]{1,0} bitcast(%cut)
  ROOT %call = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%p1, %flat), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

%two (q: f32[8]) -> (f32[8], bf16[64,32]) {
  %q = f32[8]{0} parameter(0)
  %wide = bf16[64,32]{1,0} broadcast(%q), dimensions={}
  ROOT %both = (f32[8]{0}, bf16[64,32]{1,0}) tuple(%q, %wide)
}

ENTRY %main (a: bf16[28,16,32], b: f32[8]) -> bf16[64,16] {
  %a = bf16[28,16,32]{2,1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %pair = (f32[8]{0}, bf16[64,32]{1,0}) fusion(%b), kind=kLoop, calls=%two
  %product = (bf16[64,16]{1,0}, s8[4096]{0}) fusion(%a, %pair#1), kind=kCustom, \
calls=%sliced
  ROOT %out = bf16[64,16]{1,0} get-tuple-element(%product), index=0
}
"""


def test_library_calls_with_a_slice_before_them():
    found = hlo.count(SLICED)
    assert (found.matmuls, found.matmul_flops) == (1, 2 * 64 * 16 * 32)
    assert found.custom_calls == {"__cublas$lt$matmul": 1}
    # Of the 28 matrices one is read; the library's own space is not counted.
    assert found.traffic["matmul"] == 2 * (16 * 32 + 64 * 32 + 64 * 16)
