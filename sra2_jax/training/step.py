"""The training step: denoising and alignment losses in one jitted function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import Array
from ml_collections import ConfigDict

from sra2_jax.models.dit import patchify
from sra2_jax.training.sharding import batch_sharding, replicated
from sra2_jax.training.state import TrainState, build_alignments, build_networks
from sra2_jax.transport import Transport

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (params, draws, step) -> gradients of params, metrics
Gradients = Callable[[Any, Batch, Array], tuple[Any, Metrics]]


def make_loss(config: ConfigDict) -> Callable[..., tuple[Array, Metrics]]:
    """The combined loss, (params, draws, step) -> (scalar, metrics).

    L = mean((f(x_t, t, y) - target)^2) + sum_i weight_i(step) align_i(h_i(block), z)
    (SRA 2, arXiv 2601.17830). `draws` comes from `make_draw`.
    """
    network, heads = build_networks(config)
    alignments = build_alignments(config)
    depths = tuple(sorted({a.depth for a in alignments.values()}))
    apply: Any = network.apply

    def loss(params: Any, draws: Batch, step: Array) -> tuple[Array, Metrics]:
        inputs = draws["x_t"], draws["t"], draws["y"]
        prediction, features, c = apply({"params": params["network"]}, *inputs, depths)
        denoise = jnp.mean(jnp.square(prediction - draws["target"]))
        total, metrics = denoise, {"loss_denoise": denoise}
        for name, spec in alignments.items():
            head: Any = heads[name].apply
            variables = {"params": params["heads"][name]}
            predicted = head(variables, features[spec.depth], c)
            target = patchify(draws[f"latent_{spec.target}"], network.patch_size)
            value = spec.loss_value(predicted, target, draws["t"])
            total = total + spec.weight_at(step) * value
            metrics[f"loss_align_{name}"] = value
        return total, metrics | {"loss": total}

    return loss


def make_draw(config: ConfigDict) -> Callable[[Batch, Array], Batch]:
    """All of a step's randomness, (batch, step) -> what the loss needs.

    Draws have the shape of the global batch and depend on (seed, step) alone, so they
    are the same on any number of devices and for any gradient accumulation.
    """
    transport = Transport(**config.transport)
    scale, shift = config.latents.scaling_factor, config.latents.shift_factor
    targets = {a.target for a in build_alignments(config).values()}

    def draw(batch: Batch, step: Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        names = ("latent", "time", "noise", "label")
        keys = dict(zip(names, jax.random.split(key, 4), strict=True))
        mean = scale * (batch["mean"].astype(jnp.float32) - shift)
        std = scale * batch["std"].astype(jnp.float32)
        z = mean + std * jax.random.normal(keys["latent"], mean.shape)
        t = transport.sample_times(keys["time"], len(z))
        noise = jax.random.normal(keys["noise"], z.shape)
        x_t, target = transport.interpolate(z, noise, t)
        dropped = jax.random.bernoulli(keys["label"], config.label_dropout, t.shape)
        y = jnp.where(dropped, config.data.num_classes, batch["label"])
        latents = {"latent_sample": z, "latent_mean": mean}
        wanted = {k: v for k, v in latents.items() if k[7:] in targets}
        return {"x_t": x_t, "t": t, "y": y, "target": target} | wanted

    return draw


def accumulate(gradients: Gradients, n: int, mesh: Mesh) -> Gradients:
    """The mean of `gradients` over n micro-batches of every n-th row, one at a time."""
    if n == 1:
        return gradients
    spec = jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def split(x: Array) -> Array:
        # Strided, so that each device's rows stay on it.
        x = jnp.moveaxis(x.reshape(len(x) // n, n, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, sharding)

    def accumulated(params: Any, draws: Batch, step: Array) -> tuple[Any, Metrics]:
        def add(total: Any, part: Batch) -> tuple[Any, None]:
            value = gradients(params, part, step)
            return jax.tree.map(lambda a, b: a + b / n, total, value), None

        parts = jax.tree.map(split, draws)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, first, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    return accumulated


def make_step(
    config: ConfigDict,
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
) -> Wrapped:
    """The jitted step, (state, batch) -> (state, metrics); the state is donated.

    The batch holds mean, std (B, h, w, c) float16 and label (B,) int32, sharded over
    the mesh; the new state lies where `abstract` says. Metrics are float32 scalars that
    stay on the device.
    """
    draw, loss = make_draw(config), make_loss(config)
    alignments = build_alignments(config)
    gradients = accumulate(jax.grad(loss, has_aux=True), config.accumulate, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = draw(batch, state.step)
        draws = jax.lax.with_sharding_constraint(draws, batch_sharding(mesh))
        grads, metrics = gradients(state.params, draws, state.step)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = config.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        for name, spec in alignments.items():
            weighted = spec.weight_at(state.step) * metrics[f"loss_align_{name}"]
            metrics[f"ratio_align_{name}"] = weighted / metrics["loss_denoise"]
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(placed, replicated(mesh))
    )
