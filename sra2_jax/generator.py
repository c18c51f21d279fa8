"""Images of a run: open it, sample latents, decode, round to uint8."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sra2_jax import sampler, sharding
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Config, Latents
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.run import Run
from sra2_jax.runtime import versions
from sra2_jax.section import find
from sra2_jax.step import Program
from sra2_jax.weights import load_vae, tokenizer

# purposes of randomness while sampling; training folds in steps, which stay below
NOISE, LABELS = 2**31, 2**31 + 1
# keys of a run's config that sampling may change
CHANGEABLE = ("sampling.", "seed", "vae")
NOT_SCALED = Latents(scaling_factor=1.0)
# settings of samples on which no image depends
WITHOUT_EFFECT = ("batch_size", "versions")


def to_uint8(images: Float[Array, "b h w 3"], rounding: str) -> UInt8[Array, "b h w 3"]:
    """Images in [-1, 1] to bytes, cutting off the fraction as the references do.

    "truncate": 255 clip((x + 1) / 2), as REPA and SRA; "sit": clip(127.5 x + 128), as
    SiT and DiT.
    """
    if rounding == "sit":
        return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
    return (255 * jnp.clip((images + 1) / 2, 0, 1)).astype(jnp.uint8)


def _keys(config: Config, purpose: int, indices: Any) -> Array:
    """A key for each image, of its index and the seed alone."""
    base = jax.random.fold_in(jax.random.key(config.seed), purpose)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, indices)


def draw_labels(config: Config, indices: np.ndarray) -> np.ndarray:
    """Class (N,) of each image: a function of (config.seed, index) alone, random as
    ADM's, SiT's and REPA's, or "balanced", index mod classes.

    Raises UserError: captions have none.
    """
    if config.text.encoder:
        raise UserError("a run with captions has no classes to draw: sample prompts")
    classes = config.data.num_classes
    if config.sampling.labels == "balanced":
        return np.asarray(indices) % classes
    keys = _keys(config, LABELS, np.asarray(indices, np.int32))
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))
    return np.asarray(draw(keys)).astype(np.int64)


@lru_cache(maxsize=8)  # of programs that are called again, from a notebook
def make_sampler(program: Program) -> Callable[..., Array]:
    """Jitted (params, indices (B,), labels (B,)) -> scaled latents.

    params: of the network and, where one guides, the heads, as a state's `ema`. Of a
    program with captions they have "text" too, and labels are tokens (B, 2, L), of the
    caption and of the empty one. The noise of image i depends on (config.seed, i)
    alone, on no batch or devices.
    """
    config, mesh, transport = program.config, program.mesh, program.transport
    s, shape = config.sampling, config.latent_shape
    if s.dtype != config.model.dtype:
        own = config.override({"model.dtype": s.dtype, "model.attention": "auto"})
        program = replace(program, config=own)
    guidance = sampler.Guidance(
        s.guidance, s.guidance_low, s.guidance_high, s.guidance_channels
    )
    head = sampler.Guidance(s.head_guidance, s.head_guidance_low, s.head_guidance_high)
    align: Any = program.alignments["vae"] if s.head_guidance != 1 else None

    def run(params: Any, indices: Array, labels: Array) -> Array:
        keys = _keys(config, NOISE, indices)

        def cast(path: Any, x: Array) -> Array:
            return x if path[-1].key == "embedding" else x.astype(s.dtype)

        # Once, not in every step, which would convert them alike.
        params = jax.tree_util.tree_map_with_path(cast, params)

        @partial(jax.vmap, in_axes=(0, None))
        def draw(key: Array, i: Array | int) -> Array:
            return jax.random.normal(jax.random.fold_in(key, i), shape)

        def velocity(x: Array, t: Array, y: Array) -> Any:
            network, inputs = program.running, (params["network"], x, t, y)
            with sharding.within(mesh):
                if not align:
                    return transport.velocity(apply(network, *inputs)[0], x, t)
                output, kept, c = apply(network, *inputs, (align.depth,))
                tokens = kept[align.depth]
                early = apply(program.heads["vae"], params["heads"]["vae"], tokens, c)
            early = align.velocity(early, x, t, network, transport)
            return transport.velocity(output, x, t), early

        null: Array | int = config.data.num_classes
        if program.reader:
            read = partial(program.read, params["text"])
            labels, null = read(labels[:, 0]), read(labels[:1, 1])
        x = jax.lax.with_sharding_constraint(
            draw(keys, s.steps), sharding.batch_sharding(mesh)
        )
        return sampler.sample(
            velocity,
            x,
            labels,
            null=null,
            method=s.method,
            steps=s.steps,
            transport=transport,
            guidance=guidance,
            head=head,
            noise=partial(draw, keys),
        )

    return jax.jit(run, out_shardings=sharding.batch_sharding(mesh))


@dataclass(frozen=True)
class Generator:
    """Samples with a program's network, decodes and rounds, on the program's mesh.

    params: a state's `params` or `ema`, for calls without any; settings: what its
    samples are, for the file they go to; text: the encoder of captions, where `params`
    have none.
    """

    program: Program
    vae: AutoencoderKL
    vae_params: Any
    params: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    text: Any = None

    @classmethod
    def of(cls, program: Program) -> "Generator":
        """With the VAE of the config, and what reads captions. Raises UserError: there
        is none."""
        vae, params = load_vae(program.config.vae)
        params = jax.device_put(params, sharding.replicated(program.mesh))
        text = program.text if "text" in program.frozen else None
        return cls(program, vae, params, text=text)

    @property
    def config(self) -> Config:
        return self.program.config

    @property
    def batch(self) -> int:
        """Images at a time: a multiple of the devices."""
        return sharding.rounded(self.config.sampling.batch_size, self.program.mesh.size)

    def override(self, values: Mapping[str, Any]) -> "Generator":
        """The same with other keys of its config."""
        config = self.config.override(values)
        return replace(self, program=Program(config, self.program.mesh))

    @property
    def _place(self) -> jax.sharding.NamedSharding:
        return sharding.replicated(self.program.mesh)

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """uint8 images of latents (N, h, w, c) as the VAE gives them, not scaled."""
        how = self.vae, NOT_SCALED, self.config.sampling.rounding, self._place
        images, _ = _decode(*how, self.vae_params, self._spread(raw))
        return np.asarray(images)[: len(raw)]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Mean latents, not scaled, of uint8 images (N, H, W, 3)."""
        means = _encode(self.vae, self._place, self.vae_params, self._spread(images))
        return np.asarray(means)[: len(images)]

    def _spread(self, x: np.ndarray) -> Array:
        """Rows, filled up, of which each device has as many."""
        mesh = self.program.mesh
        return sharding.spread(x, sharding.rounded(len(x), mesh.size), mesh)

    def __call__(
        self, indices: np.ndarray, labels: np.ndarray, params: Any = None
    ) -> Iterator[np.ndarray]:
        """Images of indices (N,) and labels (N,), see `make_sampler`, in batches of
        uint8 (n, H, W, 3).

        Raises UserError: values that are no numbers, which would be black.
        """
        params = self.params if params is None else params
        if self.text is not None:
            params = {**params, "text": self.text}
        batch, ahead, sample = self.batch, None, make_sampler(self.program)
        rounding = self.config.sampling.rounding
        how = self.vae, self.config.latents, rounding, self._place
        for start in range(0, len(indices), batch):
            # The last batch is filled up with copies: one shape, one compilation.
            rows = np.arange(start, start + batch).clip(max=len(indices) - 1)
            numbers, classes = (x[rows].astype(np.int32) for x in (indices, labels))
            z = sample(params, numbers, classes)
            behind, ahead = ahead, _decode(*how, self.vae_params, z)
            if behind is not None:
                yield _finite(behind)
        if ahead is not None:
            yield _finite(ahead)[: (len(indices) - 1) % batch + 1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(
    vae: AutoencoderKL, latents: Latents, rounding: str, place: Any, params: Any, z: Any
) -> tuple[Array, Array]:
    """Images of scaled latents, and whether all were numbers; in their place."""
    raw = z / latents.scale + latents.shift
    images = apply(vae, params, raw, method="decode")
    found = to_uint8(images, rounding), jnp.isfinite(images).all()
    return jax.lax.with_sharding_constraint(found, place)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(vae: AutoencoderKL, place: Any, params: Any, images: Array) -> Array:
    pixels = images.astype(jnp.float32) / 127.5 - 1
    means = apply(vae, params, pixels, method="encode")[0]
    return jax.lax.with_sharding_constraint(means, place)


def _finite(decoded: tuple[Array, Array]) -> np.ndarray:
    images, numbers = decoded
    if not numbers:
        raise UserError(
            "samples are not finite numbers: try another checkpoint or a smaller "
            "sampling.guidance, and look at the VAE (its reconstructions)"
        )
    return np.asarray(images)


def generate(
    program: Program,
    params: Any,
    labels: Sequence[int] | Sequence[str] | np.ndarray,
    **sampling: Any,
) -> np.ndarray:
    """uint8 images (N, H, W, 3) of classes (N,), or of as many prompts, with the
    program's VAE.

    params: of the network and its heads, as state.ema; sampling: keys of
    config.sampling to change, guidance=1.8.

    Raises UserError: no such key, value or VAE.
    """
    values = {f"sampling.{name}": value for name, value in sampling.items()}
    images = Generator.of(program).override(values)
    rows = prompted(program.config, labels) if program.reader else np.asarray(labels)
    return np.concatenate([*images(np.arange(len(rows)), rows, params)])


def prompted(config: Config, prompts: Any) -> np.ndarray:
    """Tokens (N, 2, L) of prompts, each beside the empty one."""
    tokens = tokenizer(config.text.encoder)([*prompts, ""])
    return np.stack([tokens[:-1], tokens[-1:].repeat(len(prompts), 0)], axis=1)


def read_settings(workdir: str, overrides: Mapping[str, str]) -> Config:
    """A run's config with overrides of what sampling may change.

    Raises UserError: no run, a key that is none or that sampling must not change.
    """
    for name in overrides:
        free = name.startswith("model.") and find(Config, name).metadata["key"].free
        if not (free or name.startswith(CHANGEABLE)):
            changeable = "config.sampling.*, config.seed, config.vae"
            raise UserError(
                f"config.{name} is part of the run: sampling can change {changeable}"
            )
    return Run(workdir).config().override(overrides)


def open_run(
    workdir: str, config: Config, weights: str = "ema", step: int | None = None
) -> Generator:
    """A run's weights (see `Program.weights`) and its VAE, on all devices.

    Optimizer moments and the other set of weights are not read: a quarter of the file.
    config: as of `read_settings`; step: of the checkpoint, the newest by default.

    Raises UserError: no such run, checkpoint, weights or VAE.
    """
    program = Program(config, sharding.make_mesh())
    generator = Generator.of(program)
    path = program.weights(weights)
    held = reduce(getitem, path, vars(program.abstract))
    params: dict[str, Any] = {n: held[n] for n in ("network", "text") if n in held}
    if config.sampling.head_guidance != 1:
        params["heads"] = {"vae": held["heads"]["vae"]}
    wanted: Any = reduce(lambda tree, name: {name: tree}, reversed(path), params)
    with Checkpoints(Run(workdir)) as checkpoints:
        state = checkpoints.restore(wanted | {"step": program.abstract.step}, step)
    facts = {"run": workdir, "step": int(state["step"]), "weights": weights}
    settings = describe(config, **facts, versions=versions())
    return replace(generator, params=reduce(getitem, path, state), settings=settings)


def describe(config: Config, **more: Any) -> dict[str, Any]:
    """What made a set of samples, for the file it goes to."""
    return {
        "config": config.name,
        **more,
        "seed": config.seed,
        "vae": config.vae,
        **vars(config.sampling),
        "resolution": config.data.resolution,
        "num_classes": config.data.num_classes,
    }


def refuse_others(
    where: Any, saved: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise UserError where saved samples have other settings than those to be made."""
    now = json.loads(json.dumps(settings))
    for key in sorted((now.keys() | saved.keys()) - {*WITHOUT_EFFECT}):
        if now.get(key) != saved.get(key):
            raise UserError(
                f"{where} has other samples: {key} is {saved.get(key)!r} there, "
                f"{now.get(key)!r} now: use another --out or remove it"
            )


def grid(images: np.ndarray, columns: int, border: int = 2) -> np.ndarray:
    """uint8 images (N, H, W, 3), row by row, to one picture on white."""
    rows, edges = -(-len(images) // columns), ((border, 0), (border, 0), (0, 0))
    white: Any = {"constant_values": 255}
    cells = np.pad(images, ((0, rows * columns - len(images)), *edges), **white)
    _, h, w, c = cells.shape
    picture = cells.reshape(rows, columns, h, w, c).swapaxes(1, 2)
    picture = picture.reshape(rows * h, columns * w, c)
    return np.pad(picture, ((0, border), (0, border), (0, 0)), **white)
