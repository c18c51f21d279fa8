"""Our side of `benchmarks.peer`: the project's own training step, on one device."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.config import Config
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program
from sra2_jax.weights.sit import to_reference
from tools.measure import prepare

ROWS = 2  # of the check: float32 without rematerialisation is large


def random_weights(shapes: Any) -> Any:
    """Parameters of network and heads, none of them zero, so that every part counts."""
    draw, flat = np.random.default_rng(0), traverse_util.flatten_dict(shapes)
    for path, leaf in flat.items():
        scale = leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.1
        flat[path] = scale * draw.standard_normal(leaf.shape, np.float32)
    return traverse_util.unflatten_dict(flat)


def random_inputs(config: Config) -> dict[str, np.ndarray]:
    """Data, posterior mean and noise (B, h, w, c), times and labels (B,), one null."""
    shape, draw = (ROWS, *config.latent_shape), np.random.default_rng(1)
    inputs = {
        name: draw.standard_normal(shape, np.float32) for name in ("z", "mean", "noise")
    }
    inputs["t"] = draw.uniform(size=ROWS).astype(np.float32)
    inputs["y"] = np.array([0, config.data.num_classes], np.int32)
    return inputs


class Worker:
    """What `benchmarks.peer_worker` asks for."""

    def facts(self) -> dict[str, Any]:
        """The device and the versions, in words.

        Raises:
          UserError: there are several devices.
        """
        if jax.device_count() > 1:
            raise UserError(
                f"JAX sees {jax.device_count()} devices, one is compared: set "
                "CUDA_VISIBLE_DEVICES=0, and no XLA_FLAGS that simulate more"
            )
        kind = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        name = jax.devices()[0].device_kind
        return {"device": kind, "name": name, "text": f"jax {jax.__version__}"}

    def check(self, config: dict[str, Any], weights: str, out: str) -> dict[str, Any]:
        """Write weights and inputs, and what float32 makes of them, to two files.

        The first holds random weights under SiT's names and random inputs; the second
        velocity, loss and grad_norm.
        """
        plain = {"model.dtype": "float32", "model.attention": "xla"}
        c = Config.of(config).override(plain)
        program = Program(c, make_mesh(), "xla")
        params = random_weights(program.abstract.params)
        inputs = random_inputs(c)
        reference = to_reference(
            params["network"], params["heads"], HEAD_NAMES, program.network
        )
        arrays = {f"weight/{k}": v for k, v in reference.items()}
        np.savez(weights, **arrays, **{f"input/{k}": v for k, v in inputs.items()})
        del reference, arrays

        def answers(params: Any, z: Any, mean: Any, noise: Any, t: Any, y: Any) -> Any:
            x_t, target = program.transport.interpolate(z, noise, t)
            draws = {"x_t": x_t, "t": t, "y": y, "target": target}
            draws |= {"latent_sample": z, "latent_mean": mean}
            values = jax.value_and_grad(program.loss, has_aux=True)
            rest = None, {}, draws, jnp.zeros((), jnp.int32)
            (total, _), grads = values(params, *rest)
            velocity, _, _ = apply(program.running, params["network"], x_t, t, y)
            return velocity, total, optax.tree.norm(grads)

        with jax.default_matmul_precision("highest"):
            velocity, total, norm = jax.jit(answers)(params, **inputs)
        np.savez(out, velocity=velocity, loss=total, grad_norm=norm)
        return {}

    def prepare(self, config: dict[str, Any], batch: str) -> dict[str, Any]:
        """Compile the step and write the made-up batch to a file; warms up."""
        self.timed = prepare(Config.of(config))
        np.savez(batch, **{k: np.asarray(v) for k, v in self.timed.batch.items()})
        self.timed()
        return {"prepare_seconds": self.timed.compile_seconds}

    def run(self, steps: int) -> dict[str, Any]:
        """One step to wake up, then `steps` timed ones; seconds of one of them."""
        jax.block_until_ready((self.timed(), self.timed.state))
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            metrics = self.timed()
        jax.block_until_ready((metrics, self.timed.state))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        statistics = jax.devices()[0].memory_stats() or {}
        return {
            "seconds": seconds / steps,
            "cpu_seconds": cpu / steps,
            "loss": float(metrics["loss"]),
            "peak_bytes": statistics.get("peak_bytes_in_use"),
        }
