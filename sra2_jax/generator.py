"""Images of a run: open it, sample latents, decode, round to uint8."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sra2_jax import sampler, sharding
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.config import Config
from sra2_jax.errors import UserError
from sra2_jax.models import apply
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.run import Run
from sra2_jax.runtime import versions
from sra2_jax.section import fields, parse
from sra2_jax.step import Program
from sra2_jax.weights import load_vae

# purposes of randomness while sampling; training folds in steps, which stay below
NOISE, LABELS = 2**31, 2**31 + 1
# keys of a run's config that sampling may change
CHANGEABLE = ("sampling.", "seed", "vae")
# settings of samples on which no image depends
WITHOUT_EFFECT = ("batch_size", "versions")


def to_uint8(images: Float[Array, "b h w 3"], rounding: str) -> UInt8[Array, "b h w 3"]:
    """Images in [-1, 1] to bytes, cutting off the fraction: "truncate" as REPA and SRA,
    "sit" as SiT and DiT."""
    if rounding == "sit":
        return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
    return (255 * jnp.clip((images + 1) / 2, 0, 1)).astype(jnp.uint8)


def _keys(config: Config, purpose: int, indices: Any) -> Array:
    """A key for each image, of its index and the seed alone."""
    base = jax.random.fold_in(jax.random.key(config.seed), purpose)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, indices)


def draw_labels(config: Config, indices: np.ndarray) -> np.ndarray:
    """Class (N,) of each image: a function of (config.seed, index) alone, random as
    ADM's, SiT's and REPA's, or "balanced", index mod classes."""
    classes = config.data.num_classes
    if config.sampling.labels == "balanced":
        return np.asarray(indices) % classes
    keys = _keys(config, LABELS, np.asarray(indices, np.int32))
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))
    return np.asarray(draw(keys)).astype(np.int64)


def make_sampler(program: Program) -> Callable[..., Array]:
    """Jitted (params, indices (B,), labels (B,)) -> scaled latents.

    params: of the network and, where one guides, the heads, as a state's `ema`. The
    noise of image i depends on (config.seed, i) alone, on no batch or devices.
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

        x = jax.lax.with_sharding_constraint(
            draw(keys, s.steps), sharding.batch_sharding(mesh)
        )
        return sampler.sample(
            velocity,
            x,
            labels,
            null=config.data.num_classes,
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
    samples are, for the file they go to.
    """

    program: Program
    vae: AutoencoderKL
    vae_params: Any
    params: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> "Generator":
        """With the VAE of the config. Raises UserError: there is none."""
        vae, params = load_vae(program.config.vae)
        params = jax.device_put(params, sharding.replicated(program.mesh))
        return cls(program, vae, params)

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

    @cached_property
    def _sample(self) -> Callable[..., Array]:
        return make_sampler(self.program)

    def _pixels(self, vae_params: Any, raw: Array) -> tuple[Array, Array]:
        """Images of latents that are not scaled, and whether all were numbers."""
        images = apply(self.vae, vae_params, raw, method="decode")
        pixels = to_uint8(images, self.config.sampling.rounding)
        return pixels, jnp.isfinite(images).all()

    @cached_property
    def _decode(self) -> Callable[[Any, Array], tuple[Array, Array]]:
        """`_pixels` of scaled latents, the same on all devices."""
        latents = self.config.latents

        def decode(vae_params: Any, z: Array) -> tuple[Array, Array]:
            return self._pixels(vae_params, z / latents.scale + latents.shift)

        return jax.jit(decode, out_shardings=sharding.replicated(self.program.mesh))

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """uint8 images of latents (N, h, w, c) as the VAE gives them, not scaled."""
        return self._split(lambda *inputs: self._pixels(*inputs)[0], raw)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Mean latents, not scaled, of uint8 images (N, H, W, 3)."""

        def means(vae_params: Any, images: Array) -> Array:
            pixels = images.astype(jnp.float32) / 127.5 - 1
            return apply(self.vae, vae_params, pixels, method="encode")[0]

        return self._split(means, images)

    def _split(self, function: Callable[..., Array], x: np.ndarray) -> np.ndarray:
        """A function of the VAE's parameters and x, whose rows the devices share."""
        mesh = self.program.mesh
        rows = sharding.spread(x, sharding.rounded(len(x), mesh.size), mesh)
        run = jax.jit(function, out_shardings=sharding.replicated(mesh))
        return np.asarray(run(self.vae_params, rows))[: len(x)]

    def __call__(
        self, indices: np.ndarray, labels: np.ndarray, params: Any = None
    ) -> Iterator[np.ndarray]:
        """Images of indices (N,) and labels (N,), in batches of uint8 (n, H, W, 3).

        Raises UserError: values that are no numbers, which would be black.
        """
        params = self.params if params is None else params
        starts = range(0, len(indices), self.batch)

        def begin(start: int) -> Any:
            # The last batch is filled up with copies: one shape, one compilation.
            rows = np.arange(start, start + self.batch).clip(max=len(indices) - 1)
            numbers, classes = (x[rows].astype(np.int32) for x in (indices, labels))
            return self._decode(self.vae_params, self._sample(params, numbers, classes))

        # A batch is on its way to the device before the one before it is handed out:
        # whatever is done with that (files, features) costs the device no time.
        ahead = itertools.pairwise(itertools.chain(map(begin, starts), [None]))
        for start, ((images, finite), _) in zip(starts, ahead, strict=True):
            if not finite:
                raise UserError(
                    "samples are not finite numbers: try another checkpoint or a "
                    "smaller sampling.guidance, and look at the VAE"
                )
            yield np.asarray(images)[: len(indices) - start]


def generate(
    program: Program, params: Any, labels: Sequence[int], **sampling: Any
) -> np.ndarray:
    """uint8 images (N, H, W, 3) of classes, with the program's VAE.

    params: of the network and its heads, as state.ema; sampling: keys of
    config.sampling to change, guidance=1.8.

    Raises UserError: no such key, value or VAE.
    """
    values = {f"sampling.{name}": value for name, value in sampling.items()}
    images = Generator.of(program).override(values)
    indices = np.arange(len(labels))
    return np.concatenate([*images(indices, np.asarray(labels), params)])


def read_settings(workdir: str, overrides: Mapping[str, str]) -> Config:
    """A run's config with overrides. Raises UserError: no run, a key that is none or
    that sampling must not change."""
    values = parse(Config, overrides)
    for name in values:
        free = name.startswith("model.") and fields(Config)[name].metadata["key"].free
        if not (free or name.startswith(CHANGEABLE)):
            changeable = "config.sampling.*, config.seed, config.vae"
            raise UserError(
                f"config.{name} is part of the run: sampling can change {changeable}"
            )
    return Run(workdir).config().override(values)


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
    params = {"network": held["network"]}
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
