"""Our side of `benchmarks.peer`: the project's own training step, on one device."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict
from sra2_jax.optim import make_optimizer
from sra2_jax.state import build_networks, init_state

from sra2_jax import config as configuration
from sra2_jax.errors import UserError
from sra2_jax.step import make_loss
from sra2_jax.transport import Transport
from sra2_jax.weights.sit import to_reference
from tools.measure import prepare

ROWS = 2  # of the check: float32 without rematerialisation is large


def random_weights(config: ConfigDict) -> Any:
    """Parameters of network and heads, none of them zero, so that every part counts."""
    network, heads = build_networks(config)
    transform, _ = make_optimizer(**config.optim)
    shapes = jax.eval_shape(
        lambda: init_state(network, heads, transform, jax.random.key(0)).params
    )
    draw, flat = np.random.default_rng(0), traverse_util.flatten_dict(shapes)
    for path, leaf in flat.items():
        scale = leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.1
        flat[path] = scale * draw.standard_normal(leaf.shape, np.float32)
    return traverse_util.unflatten_dict(flat)


def random_inputs(config: ConfigDict) -> dict[str, np.ndarray]:
    """Data, posterior mean and noise (B, h, w, c), times and labels (B,), one null."""
    side, draw = config.latents.size, np.random.default_rng(1)
    shape = ROWS, side, side, config.latents.channels
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
        c = configuration.from_saved(config, "the request")
        c = ConfigDict(c.to_dict())
        c.model.dtype, c.model.attention = "float32", "xla"
        network, _ = build_networks(c)
        loss, apply = make_loss(c), network.apply
        params, inputs = random_weights(c), random_inputs(c)
        reference = to_reference(
            params["network"],
            params["heads"],
            size=c.latents.size,
            patch_size=c.model.patch_size,
        )
        arrays = {f"weight/{k}": v for k, v in reference.items()}
        np.savez(weights, **arrays, **{f"input/{k}": v for k, v in inputs.items()})
        del reference, arrays

        def answers(params: Any, z: Any, mean: Any, noise: Any, t: Any, y: Any) -> Any:
            x_t, target = Transport(**c.transport).interpolate(z, noise, t)
            draws = {"x_t": x_t, "t": t, "y": y, "target": target}
            draws |= {"latent_sample": z, "latent_mean": mean}
            frozen = {"teacher": None, "encoder": None}
            values = jax.value_and_grad(loss, has_aux=True)
            (total, _), grads = values(params, frozen, draws, jnp.zeros((), jnp.int32))
            velocity, _, _ = apply({"params": params["network"]}, x_t, t, y)
            return velocity, total, optax.tree.norm(grads)

        with jax.default_matmul_precision("highest"):
            velocity, total, norm = jax.jit(answers)(params, **inputs)
        np.savez(out, velocity=velocity, loss=total, grad_norm=norm)
        return {}

    def prepare(self, config: dict[str, Any], batch: str) -> dict[str, Any]:
        """Compile the step and write the made-up batch to a file; warms up."""
        self.timed = prepare(configuration.from_saved(config, "the request"))
        np.savez(batch, **{k: np.asarray(v) for k, v in self.timed.batch.items()})
        self.step()
        return {"prepare_seconds": self.timed.compile_seconds}

    def step(self) -> Any:
        """One step, not waited for; its metrics."""
        run = self.timed
        run.state, metrics = run.step(run.state, run.batch, run.encoder_params)
        return metrics

    def run(self, steps: int) -> dict[str, Any]:
        """One step to wake up, then `steps` timed ones; seconds of one of them."""
        jax.block_until_ready((self.step(), self.timed.state))
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            metrics = self.step()
        jax.block_until_ready((metrics, self.timed.state))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        statistics = jax.devices()[0].memory_stats() or {}
        return {
            "seconds": seconds / steps,
            "cpu_seconds": cpu / steps,
            "loss": float(metrics["loss"]),
            "peak_bytes": statistics.get("peak_bytes_in_use"),
        }
