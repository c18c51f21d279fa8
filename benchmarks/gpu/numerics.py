"""How far bfloat16 and cuDNN's attention are from float32, on this device.

    python -m benchmarks.gpu.numerics --config=configs/sra2_b.py --batch_size=32

Loss and gradients of the same random weights and inputs, against float32 with exact
products: ||a - b|| / ||b||. Of the gradients also the worst array, and biases by
themselves: they are sums over all tokens, in the compute type. Then attention by
itself, forward and backward, with times; then whether a step repeats bit for bit.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks.peer_jax import random_weights
from sra2_jax.command import Parser, run_program, writable
from sra2_jax.config import Config
from sra2_jax.errors import one_line
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from tools.measure import machine, prepare

# name -> (dtype, attention, precision of float32 products)
CASES = {
    "float32, default precision": ("float32", "xla", None),
    "bfloat16, XLA's attention": ("bfloat16", "xla", None),
    "bfloat16, cuDNN's attention": ("bfloat16", "cudnn", None),
}


def evaluate(config: Config, params: Any, batch: Any, case: tuple[Any, ...]) -> Any:
    """Loss and gradients, {name: array}."""
    dtype, attention, precision = case
    chosen = {"model.dtype": dtype, "model.attention": attention}
    program = Program(config.override(chosen), make_mesh(), attention)

    def run(params: Any, batch: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        values = jax.value_and_grad(program.loss, has_aux=True)
        (total, _), grads = values(params, None, {}, program.draw(batch, step), step)
        return total, grads

    with jax.default_matmul_precision(precision):
        total, grads = jax.device_get(jax.jit(run)(params, batch))
    return float(total), traverse_util.flatten_dict(grads, sep="/")


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def compare(grads: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Errors of gradients: of all, of the worst arrays and the median ones."""
    errors = {name: error(grads[name], exact[name]) for name in exact}
    whole = [np.concatenate([g[n].ravel() for n in exact]) for g in (grads, exact)]
    biases = {n: e for n, e in errors.items() if n.endswith("bias")}
    kernels = [e for n, e in errors.items() if n.endswith("kernel")]
    worst, bias = max(errors, key=errors.__getitem__), max(biases, key=biases.get)
    return {
        "gradient": error(*whole),
        "worst": [worst, errors[worst]],
        "worst_bias": [bias, biases[bias]],
        "median_bias": float(np.median(list(biases.values()))),
        "median_kernel": float(np.median(kernels)),
    }


def attention(tokens: int, size: int) -> list[dict[str, Any]]:
    """Errors and milliseconds of attention, forward and backward; 32 rows, 4 heads."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(x, (32, tokens, 4, size)) for x in keys)

    def both(name: Any, dtype: Any) -> Any:
        def run(*arrays: Any) -> Any:
            def forward(*qkv: Any) -> Any:
                return jax.nn.dot_product_attention(*qkv, implementation=name)

            out, back = jax.vjp(forward, *(x.astype(dtype) for x in arrays[:3]))
            return out, *back(arrays[3].astype(dtype))

        return jax.jit(run)

    with jax.default_matmul_precision("highest"):
        exact = jax.device_get(both("xla", jnp.float32)(q, k, v, g))
    rows_out = []
    for name in ("xla", "cudnn"):
        row: dict[str, Any] = {"tokens": tokens, "head": size, "attention": name}
        try:
            run, seconds = both(name, jnp.bfloat16), []
            found = jax.device_get(run(q, k, v, g))
            for part, x, y in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
                row[part] = error(x, y)
            for _ in range(10):
                began = time.perf_counter()
                jax.block_until_ready(run(q, k, v, g))
                seconds.append(time.perf_counter() - began)
            row["milliseconds"] = 1e3 * float(np.median(seconds))
        except Exception as failure:  # of any layer
            row["failed"] = one_line(failure)
        rows_out.append(row)
        print(row, flush=True)
    return rows_out


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--batch_size", type=int, default=32)
    add("--tokens", default="256,1024", help="of attention alone (%(default)s)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments, config = parser.parse_config("sra2_b")
    config = config.override({"batch_size": arguments.batch_size})
    program, draw = Program(config, make_mesh()), np.random.default_rng(0)
    params = random_weights(program.abstract.params)
    shape = program.batch["mean"].shape
    batch = {
        "mean": draw.standard_normal(shape).astype(np.float16),
        "std": np.full(shape, 0.1, np.float16),
        "label": draw.integers(config.data.num_classes, size=shape[0], dtype=np.int32),
    }
    facts = machine()
    print(facts, flush=True)
    total, exact = evaluate(config, params, batch, ("float32", "xla", "highest"))
    cases = []
    for name, case in CASES.items():
        try:
            loss, grads = evaluate(config, params, batch, case)
        except Exception as failure:  # of any layer
            print(f"{name}: failed: {one_line(failure)}", flush=True)
            continue
        cases.append({"case": name, "loss": loss / total - 1, **compare(grads, exact)})
        print(json.dumps(cases[-1]), flush=True)
    tokens = map(int, arguments.tokens.split(","))
    alone = [row for t in tokens for size in (64, 72) for row in attention(t, size)]
    norms, run = [], prepare(config)
    for _ in range(2):
        run.state = run.program.start()
        for _ in range(3):
            run()
        norms.append(float(optax.tree.norm(run.state.params)))
    print(f"three steps twice give the same norm: {norms[0] == norms[1]} ({norms})")
    if arguments.json:
        result = {"machine": facts, "loss": total, "cases": cases, "attention": alone}
        result["repeats"] = norms[0] == norms[1]
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
