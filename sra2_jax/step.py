"""The training step: one object that knows the shapes, the loss and the update.

L = mean((f(x_t, t, y) - target)^2) + sum_i weight_i(step) align_i(h_i(block), z_i)

(SRA 2, arXiv 2601.17830, and with other targets z_i SRA and REPA.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from sra2_jax import optimizer, sharding
from sra2_jax.alignment import ALIGNMENTS, Alignment
from sra2_jax.alignment.base import head_macs
from sra2_jax.attention import implementation
from sra2_jax.config import CAPTIONS, Config
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.models.clip import CLIPText
from sra2_jax.models.dit import DiT
from sra2_jax.models.mmdit import MMDiT, torch_default
from sra2_jax.transport import Transport
from sra2_jax.weights import describe_clip, load_clip

Batch = dict[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class State:
    """All that a run needs to go on; randomness and data order follow from `step`.

    `params` and `ema` are {"network": DiT's tree, "heads": {name: head's tree}}, and
    "text" where an encoder is trained along; in `ema` lie also the averages of
    config.ema_others, each by its decay, as text.
    """

    step: Array
    params: Any
    ema: Any
    opt_state: Any


@dataclass(frozen=True)
class Program:
    """A config on a mesh: what everything that compiles a step or a sampler uses.

    Nothing is computed or allocated before it is asked for. attention: implementation,
    where it is not to be tried on this machine's device.
    """

    config: Config
    mesh: Mesh
    attention: Literal["", "xla", "cudnn"] = ""

    @cached_property
    def network(self) -> DiT:
        """The backbone, for its shapes; `running` computes."""
        size, _, channels = self.config.latent_shape
        model, classes = self.config.model, self.config.data.num_classes
        dtype = jnp.dtype(model.dtype)
        if not self.reader:
            return DiT(model, size, channels, classes, dtype=dtype)
        own: Any = {"text_tokens": self.reader.config.max_position_embeddings}
        own["text_width"] = self.reader.config.hidden_size
        return MMDiT(model, size, channels, classes, dtype=dtype, **own)

    @cached_property
    def reader(self) -> CLIPText | None:
        """What reads captions; None where there are labels."""
        encoder = self.config.text.encoder
        return describe_clip(encoder) if encoder else None

    @cached_property
    def text(self) -> Any:
        """Parameters of a `reader` that stays as it is, on every device, for the step
        and the samples. Raises UserError where there are none."""
        params = load_clip(self.config.text.encoder)[1]
        return jax.device_put(params, sharding.replicated(self.mesh))

    @cached_property
    def running(self) -> DiT:
        """The backbone with the attention that the device runs best."""
        m = self.config.model
        sizes = self.network.tokens, m.heads, m.width // m.heads
        chosen = self.attention or implementation(m.attention, m.dtype, *sizes)
        return self.network.clone(attention=chosen)

    @cached_property
    def alignments(self) -> dict[str, Alignment]:
        """Those that are on, by name, in the order of names: seeds follow it."""
        sections = sorted(vars(self.config.align).items())
        return {n: ALIGNMENTS[n](**vars(s)) for n, s in sections if s.enabled}

    @cached_property
    def heads(self) -> dict[str, nn.Module]:
        return {n: a.head(self.network) for n, a in self.alignments.items()}

    @cached_property
    def transport(self) -> Transport:
        return Transport(**vars(self.config.transport))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizer.optimizer(self.config.optim)

    def init(self) -> State:
        """Step 0; the EMA starts as a copy of the parameters."""
        d, inputs = self.config.model.width, self.network.inputs()
        tokens, c = jnp.zeros((1, self.network.grid**2, d)), jnp.zeros((1, d))
        key = jax.random.key(self.config.seed)
        first, *keys = jax.random.split(key, 1 + len(self.heads))
        network = self.network.init(first, *inputs)["params"]
        params: dict[str, Any] = {
            "network": torch_default(network, first) if self.reader else network,
            "heads": {
                name: head.init(k, tokens, c)["params"]
                for k, (name, head) in zip(keys, self.heads.items(), strict=True)
            },
        }
        if self.reader and self.config.text.train:
            own = jax.random.fold_in(key, 1)
            text = self.reader.init(own, jnp.zeros((1, 1), jnp.int32))
            params["text"] = text["params"]
        copies = {name: jax.tree.map(jnp.copy, params) for name in self.others}
        ema = jax.tree.map(jnp.copy, params) | copies
        opt_state = self.optimizer.init(params)
        return State(jnp.zeros((), jnp.int32), params, ema, opt_state)

    @cached_property
    def others(self) -> dict[str, float]:
        """The decays of further averages, by their names in `ema`."""
        return {repr(decay): decay for decay in self.config.ema_others}

    def weights(self, name: str) -> tuple[str, ...]:
        """Where a set of weights lies in a state: "ema", "raw", or the decay of another
        average. Raises UserError: the run has none of that name."""
        places: dict[str, tuple[str, ...]] = {"ema": ("ema",), "raw": ("params",)}
        places |= {other: ("ema", other) for other in self.others}
        if name not in places:
            raise UserError(f"no weights {name!r}: the run has {', '.join(places)}")
        return places[name]

    @cached_property
    def abstract(self) -> State:
        """The state's shapes with their places; no array exists."""
        return sharding.placed(jax.eval_shape(self._traced), self.mesh)

    @cached_property
    def _traced(self) -> Any:
        """`init`, traced once for its shapes and its values."""
        return jax.jit(self.init)

    @cached_property
    def places(self) -> State:
        """The sharding of each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def start(self) -> State:
        """The state of step 0, each array made in its place."""
        return jax.jit(lambda: self._traced(), out_shardings=self.places)()

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """What the step reads of a record besides latent and label."""
        captions = ("captions",) if self.reader else ()
        own = {f: f for a in self.alignments.values() for f in a.fields}
        return (*captions, *own)

    @cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of the step, split over the mesh: mean, std (B, h, w, c) float16,
        label (B,) int32, and as `fields` says image (B, R, R, 3) uint8, features
        (B, T, d) float16, captions (B, n + 1, L) uint16, tokens, the last one empty."""
        c, place = self.config, sharding.batch_sharding(self.mesh)
        readers = (a for a in self.alignments.values() if "features" in a.fields)
        width = next((a.features(self.network) for a in readers), 0)
        length = self.reader.config.max_position_embeddings if self.reader else 0
        rows: dict[str, tuple[tuple[int, ...], Any]] = {
            "mean": (c.latent_shape, jnp.float16),
            "std": (c.latent_shape, jnp.float16),
            "label": ((), jnp.int32),
            "image": ((c.data.resolution, c.data.resolution, 3), jnp.uint8),
            "features": ((c.grid**2, width), jnp.float16),
            "captions": ((CAPTIONS + 1, length), jnp.uint16),
        }
        return {
            name: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype, sharding=place)
            for name, (shape, dtype) in rows.items()
            if name in ("mean", "std", *self.fields)
            or (name == "label" and not self.reader)
        }

    @cached_property
    def frozen(self) -> dict[str, Any]:
        """Shapes of the networks that targets run, by alignment, and of "text"."""
        place = sharding.replicated(self.mesh)
        found = {name: a.frozen for name, a in self.alignments.items()}
        found["text"] = None if self.config.text.train else self.reader
        return {n: sharding.on(f.shapes(), place) for n, f in found.items() if f}

    def load_frozen(self) -> dict[str, Any]:
        """Their parameters on every device. Raises UserError where there are none."""
        params = {
            name: self.text if name == "text" else self.alignments[name].load()
            for name in self.frozen
        }
        return jax.device_put(params, sharding.replicated(self.mesh))

    def draw(self, batch: Batch, step: Array) -> Batch:
        """All of a step's randomness: what the loss needs of a batch.

        Draws depend on (seed, step) alone: they are the same on any number of devices
        and for any gradient accumulation.
        """
        c = self.config
        key = jax.random.fold_in(jax.random.key(c.seed), step)
        names = ("latent", "time", "noise", "label", "align")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        scale, shift = c.latents.scale, c.latents.shift
        mean = scale * (batch["mean"].astype(jnp.float32) - shift)
        std = scale * batch["std"].astype(jnp.float32)
        z = mean + std * jax.random.normal(keys["latent"], mean.shape)
        t = self.transport.sample_times(keys["time"], len(z))
        noise = jax.random.normal(keys["noise"], z.shape)
        x_t, target = self.transport.interpolate(z, noise, t)
        dropped = jax.random.bernoulli(keys["label"], c.label_dropout, t.shape)
        if self.reader:
            key = jax.random.fold_in(keys["label"], 1)
            drawn = jax.random.randint(key, t.shape, 0, CAPTIONS)
            which = jnp.where(dropped, CAPTIONS, drawn)[:, None, None]
            y = jnp.take_along_axis(jnp.asarray(batch["captions"]), which, 1)[:, 0]
        else:
            y = jnp.where(dropped, c.data.num_classes, batch["label"])
        draws = {"x_t": x_t, "t": t, "y": y, "target": target}
        clean = {"z": z, "mean": mean, "noise": noise, "t": t}
        for alignment in self.alignments.values():
            draws |= alignment.draw(keys["align"], clean, self.transport)
        return draws | {name: batch[name] for name in self.fields}

    def read(self, text: Any, tokens: Array) -> Array:
        """A text encoder's features (B, L, W) of captions' tokens (B, L)."""
        assert self.reader is not None
        reader = self.reader.clone(dtype=self.network.dtype)
        return jnp.asarray(apply(reader, text, tokens.astype(jnp.int32)))

    def loss(
        self, params: Any, ema: Any, frozen: Any, draws: Batch, step: Array
    ) -> tuple[Array, Metrics]:
        """The combined loss and its terms; ema: the network's average."""
        depths = tuple(sorted({a.depth for a in self.alignments.values()}))
        if self.reader:
            text = (params if self.config.text.train else frozen)["text"]
            draws = {**draws, "y": self.read(text, draws["y"])}
        inputs = draws["x_t"], draws["t"], draws["y"]
        network = params["network"]
        prediction, features, c = apply(self.running, network, *inputs, depths)
        denoise = jnp.mean(jnp.square(prediction - draws["target"]))
        total, metrics = denoise, {"loss_denoise": denoise}
        for name, align in self.alignments.items():
            head = params["heads"][name]
            predicted = apply(self.heads[name], head, features[align.depth], c)
            target = align.compute_target(self.running, frozen.get(name), ema, draws)
            target = jax.lax.stop_gradient(target)  # also through a text
            value = align.loss_value(predicted, target.astype(jnp.float32), draws["t"])
            total = total + align.weight_at(step) * value
            metrics[f"loss_align_{name}"] = value
        return total, metrics | {"loss": total}

    def update(self, state: State, batch: Batch, frozen: Any) -> tuple[State, Metrics]:
        """One step. A loss or gradient that is not finite changes nothing but the
        step's number: metrics["skipped"] is 1 then, else 0."""
        draws = self.draw(batch, state.step)
        place = sharding.batch_sharding(self.mesh)
        draws = jax.lax.with_sharding_constraint(draws, place)
        gradients = jax.grad(self.loss, has_aux=True)
        gradients = sharding.accumulate(gradients, self.config.accumulate, self.mesh)
        with sharding.within(self.mesh):
            grads, metrics = gradients(
                state.params, state.ema["network"], frozen, draws, state.step
            )
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = kept(optax.apply_updates(state.params, updates), state.params)
        opt_state = kept(opt_state, state.opt_state)

        def average(old: Any, decay: float) -> Any:
            keep = jnp.where(finite, decay, 1.0)
            rest = jnp.where(finite, 1 - decay, 0.0)
            return jax.tree.map(lambda e, p: keep * e + rest * p, old, params)

        old = {name: state.ema[name] for name in params}
        ema = average(old, self.config.ema_decay)
        ema |= {name: average(state.ema[name], d) for name, d in self.others.items()}
        for name, align in self.alignments.items():
            weighted = align.weight_at(state.step) * metrics[f"loss_align_{name}"]
            metrics[f"ratio_align_{name}"] = weighted / metrics["loss_denoise"]
        rate = optimizer.schedule(self.config.optim)(state.step)
        metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
        metrics["skipped"] = 1 - finite.astype(jnp.float32)
        return State(state.step + 1, params, ema, opt_state), metrics

    def lower(self) -> jax.stages.Lowered:
        """(state, batch, frozen) -> (state, metrics); the state is donated."""
        out = self.places, sharding.replicated(self.mesh)
        step = jax.jit(self.update, donate_argnums=0, out_shardings=out)
        return step.lower(self.abstract, self.batch, self.frozen)

    def compile(self, frozen: Any = None) -> Callable[[State, Batch], Any]:
        """The compiled step, (state, batch) -> (state, metrics); it cannot recompile
        later. What a batch has besides is left alone. frozen: as of `load_frozen`."""
        compiled = self.lower().compile()
        frozen = self.load_frozen() if frozen is None else frozen

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            return compiled(state, {k: batch[k] for k in self.batch}, frozen)

        return step

    def flops(self) -> float:
        """FLOPs of a step by formula: 2 a multiply-accumulate, network and heads 3 x
        their forward pass, targets 1 x; what rematerialisation computes again does not
        count."""
        network, heads = self.network, self.abstract.params["heads"]
        macs = 3 * network.macs(network.model.depth)
        macs += 3 * sum(head_macs(h, network.grid**2) for h in heads.values())
        macs += sum(a.macs(network) for a in self.alignments.values())
        if self.reader:
            macs += (3 if self.config.text.train else 1) * self.reader.macs()
        return 2.0 * macs * self.config.batch_size


def count_parameters(tree: Any) -> int:
    """Numbers in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
