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

from sra2_jax.alignment import EncoderAlignment, LatentAlignment, TeacherAlignment
from sra2_jax.models.dinov2 import DINOv2
from sra2_jax.sharding import batch_sharding, replicated, within
from sra2_jax.state import TrainState, build_alignments, build_networks
from sra2_jax.targets import make_targets
from sra2_jax.transport import Transport

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (params, frozen, draws, step) -> gradients of params, metrics
Gradients = Callable[[Any, Any, Batch, Array], tuple[Any, Metrics]]


def make_loss(
    config: ConfigDict, encoder: DINOv2 | None = None
) -> Callable[..., tuple[Array, Metrics]]:
    """The combined loss, (params, frozen, draws, step) -> (scalar, metrics).

    L = mean((f(x_t, t, y) - target)^2) + sum_i weight_i(step) align_i(h_i(block), z_i)
    (SRA 2, arXiv 2601.17830, and with other targets z_i SRA and REPA). `draws` comes
    from `make_draw`, `frozen` holds the parameters behind the targets, see
    `make_targets`.
    """
    network, heads = build_networks(config)
    alignments, targets = build_alignments(config), make_targets(config, encoder)
    depths = tuple(sorted({a.depth for a in alignments.values()}))
    apply: Any = network.apply

    def loss(
        params: Any, frozen: Any, draws: Batch, step: Array
    ) -> tuple[Array, Metrics]:
        inputs = draws["x_t"], draws["t"], draws["y"]
        prediction, features, c = apply({"params": params["network"]}, *inputs, depths)
        denoise = jnp.mean(jnp.square(prediction - draws["target"]))
        total, metrics = denoise, {"loss_denoise": denoise}
        for name, spec in alignments.items():
            head: Any = heads[name].apply
            variables = {"params": params["heads"][name]}
            predicted = head(variables, features[spec.depth], c)
            target = targets[name](frozen, draws).astype(jnp.float32)
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
    alignments = build_alignments(config)

    def draw(batch: Batch, step: Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        names = ("latent", "time", "noise", "label", "teacher")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        mean = scale * (batch["mean"].astype(jnp.float32) - shift)
        std = scale * batch["std"].astype(jnp.float32)
        z = mean + std * jax.random.normal(keys["latent"], mean.shape)
        t = transport.sample_times(keys["time"], len(z))
        noise = jax.random.normal(keys["noise"], z.shape)
        x_t, target = transport.interpolate(z, noise, t)
        dropped = jax.random.bernoulli(keys["label"], config.label_dropout, t.shape)
        y = jnp.where(dropped, config.data.num_classes, batch["label"])
        draws = {"x_t": x_t, "t": t, "y": y, "target": target}
        if isinstance(spec := alignments.get("vae"), LatentAlignment):
            latents = {"sample": z, "mean": mean}
            draws[f"latent_{spec.target}"] = latents[spec.target]
        if isinstance(spec := alignments.get("teacher"), TeacherAlignment):
            u = jax.random.uniform(keys["teacher"], t.shape)
            draws["t_teacher"] = spec.teacher_times(t, u)
            draws["x_teacher"], _ = transport.interpolate(z, noise, draws["t_teacher"])
        return draws | {k: batch[k] for k in record_fields(config)}

    return draw


def record_fields(config: ConfigDict) -> tuple[str, ...]:
    """What the step needs of a record besides its latent and label: () or one of
    ("image",) and ("features",)."""
    spec = build_alignments(config).get("encoder")
    if not isinstance(spec, EncoderAlignment):
        return ()
    return ("image",) if spec.source == "images" else ("features",)


def batch_shapes(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the training step: mean, std (B, h, w, c) float16, label (B,) int32,
    and with an encoder's alignment image (B, R, R, 3) uint8 or features (B, T, d)
    float16, all split over the mesh."""
    side, channels = config.latents.size, config.latents.channels
    tokens = (side // config.model.patch_size) ** 2
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "mean": ((side, side, channels), jnp.float16),
        "std": ((side, side, channels), jnp.float16),
        "label": ((), jnp.int32),
    }
    extra: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((config.data.resolution, config.data.resolution, 3), jnp.uint8),
        "features": ((tokens, config.align.encoder.width), jnp.float16),
    }
    fields |= {name: extra[name] for name in record_fields(config)}
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *shape), dtype, sharding=batch_sharding(mesh)
        )
        for name, (shape, dtype) in fields.items()
    }


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

    def accumulated(
        params: Any, frozen: Any, draws: Batch, step: Array
    ) -> tuple[Any, Metrics]:
        def add(total: Any, part: Batch) -> tuple[Any, None]:
            value = gradients(params, frozen, part, step)
            return jax.tree.map(lambda a, b: a + b / n, total, value), None

        parts = jax.tree.map(split, draws)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, frozen, first, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    return accumulated


def make_step(
    config: ConfigDict,
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
    encoder: DINOv2 | None = None,
) -> Wrapped:
    """The jitted step, (state, batch, encoder_params) -> (state, metrics).

    The state is donated; the new one lies where `abstract` says. The batch, see
    `batch_shapes`, is sharded over the mesh. `encoder_params` are those of `encoder`,
    None where no alignment runs one. Metrics are float32 scalars that stay on the
    device. A loss or gradient that is not finite changes nothing but the step's number:
    metrics["skipped"] is 1 then, else 0.
    """
    draw, loss = make_draw(config), make_loss(config, encoder)
    alignments = build_alignments(config)
    gradients = accumulate(jax.grad(loss, has_aux=True), config.accumulate, mesh)

    def train_step(
        state: TrainState, batch: Batch, encoder_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        draws = draw(batch, state.step)
        draws = jax.lax.with_sharding_constraint(draws, batch_sharding(mesh))
        frozen = {"teacher": state.ema["network"], "encoder": encoder_params}
        with within(mesh):
            grads, metrics = gradients(state.params, frozen, draws, state.step)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = kept(optax.apply_updates(state.params, updates), state.params)
        opt_state = kept(opt_state, state.opt_state)
        keep = jnp.where(finite, config.ema_decay, 1.0)
        rest = jnp.where(finite, 1 - config.ema_decay, 0.0)
        ema = jax.tree.map(lambda e, p: keep * e + rest * p, state.ema, params)
        for name, spec in alignments.items():
            weighted = spec.weight_at(state.step) * metrics[f"loss_align_{name}"]
            metrics[f"ratio_align_{name}"] = weighted / metrics["loss_denoise"]
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        metrics["skipped"] = 1 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(placed, replicated(mesh))
    )
