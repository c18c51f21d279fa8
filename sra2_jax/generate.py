"""Images of a run: open it, sample latents, decode, round to uint8."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from sra2_jax import config as configuration
from sra2_jax import sampler
from sra2_jax.errors import UserError
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.restore import read_config, restore_weights
from sra2_jax.sharding import batch_sharding, make_mesh, replicated, within
from sra2_jax.state import build_networks
from sra2_jax.transport import Transport
from sra2_jax.versions import versions
from sra2_jax.weights import load_vae

# purposes of randomness while sampling; training folds in steps, which stay below
NOISE, LABELS = 2**31, 2**31 + 1
# keys of a run's config that sampling may change
CHANGEABLE = ("sampling.", "seed", "vae", *configuration.STATE_FREE)
# settings of samples on which no image depends
WITHOUT_EFFECT = ("batch_size", "versions", "shard")


def to_uint8(images: Float[Array, "b h w 3"], rounding: str) -> UInt8[Array, "b h w 3"]:
    """Images in [-1, 1] to bytes, cutting off the fraction as the references do.

    "truncate": 255 clip((x + 1) / 2), as REPA and SRA; "sit": clip(127.5 x + 128), as
    SiT and DiT.
    """
    if rounding == "sit":
        return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)
    return (255 * jnp.clip((images + 1) / 2, 0, 1)).astype(jnp.uint8)


def draw_labels(config: ConfigDict, indices: np.ndarray) -> np.ndarray:
    """Class (N,) of each image: a function of (config.seed, index) alone.

    config.sampling.labels: "random", uniform and independent, as ADM, SiT and REPA; or
    "balanced", index mod classes, which scores slightly better.
    """
    classes = config.data.num_classes
    if config.sampling.labels == "balanced":
        return np.asarray(indices) % classes
    base = jax.random.fold_in(jax.random.key(config.seed), LABELS)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base, np.asarray(indices, np.int32))
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))
    return np.asarray(draw(keys)).astype(np.int64)


def make_sampler(config: ConfigDict, mesh: Mesh) -> Callable[..., Array]:
    """Jitted (network params, indices (B,), labels (B,)) -> scaled latents.

    All noise of image i depends on (config.seed, i) alone: not on the batch it is in,
    nor on the number of devices.
    """
    network, _ = build_networks(config)
    # Of times of training it needs to know nothing.
    transport = Transport(config.transport.path, config.transport.prediction)
    s = config.sampling
    guidance = sampler.Guidance(
        s.guidance, s.guidance_low, s.guidance_high, s.guidance_channels
    )
    apply: Any = network.apply
    shape = (network.size, network.size, network.channels)

    def run(params: Any, indices: Array, labels: Array) -> Array:
        base = jax.random.fold_in(jax.random.key(config.seed), NOISE)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)

        def noise(i: Array | int) -> Array:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
            return jax.vmap(draw)(keys)

        def velocity(x: Array, t: Array, y: Array) -> Array:
            with within(mesh):
                output, _, _ = apply({"params": params}, x, t, y)
            return transport.velocity(output, x, t)

        x = jax.lax.with_sharding_constraint(noise(s.steps), batch_sharding(mesh))
        return sampler.sample(
            velocity,
            x,
            labels,
            null=config.data.num_classes,
            method=s.method,
            steps=s.steps,
            transport=transport,
            guidance=guidance,
            noise=noise,
        )

    return jax.jit(run, out_shardings=batch_sharding(mesh))


@dataclass(frozen=True)
class Generator:
    """Samples with a network, decodes and rounds, with all devices of a mesh.

    Attributes:
      vae, vae_params: the decoder; its parameters on every device.
      params: the network's, for calls without any.
      settings: what its samples are, for the file they go to.
    """

    config: ConfigDict
    mesh: Mesh
    vae: AutoencoderKL
    vae_params: Any
    params: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _sample(self) -> Callable[..., Array]:
        return make_sampler(self.config, self.mesh)

    @cached_property
    def _decode(self) -> Callable[[Any, Array], Array]:
        latents, rounding = self.config.latents, self.config.sampling.rounding

        @jax.jit
        def decode(vae_params: Any, z: Array) -> Array:
            raw = z / latents.scaling_factor + latents.shift_factor
            images: Any = self.vae.apply({"params": vae_params}, raw, method="decode")
            images = to_uint8(images, rounding)
            return jax.lax.with_sharding_constraint(images, replicated(self.mesh))

        return decode

    def __call__(
        self, indices: np.ndarray, labels: np.ndarray, params: Any = None
    ) -> Iterator[np.ndarray]:
        """Images of indices (N,) and labels (N,), in batches of uint8 (n, H, W, 3).

        A batch is on its way to the device before the one before it is handed out, so
        that whatever is done with that (files, features) costs the device no time.
        """
        params = self.params if params is None else params
        batch, ahead = batch_size(self.config, self.mesh), None
        for start in range(0, len(indices), batch):
            # The last batch is filled up with copies: one shape, one compilation.
            rows = np.arange(start, start + batch).clip(max=len(indices) - 1)
            numbers, classes = (x[rows].astype(np.int32) for x in (indices, labels))
            z = self._sample(params, numbers, classes)
            behind, ahead = ahead, self._decode(self.vae_params, z)
            if behind is not None:
                yield np.asarray(behind)
        if ahead is not None:
            yield np.asarray(ahead)[: (len(indices) - 1) % batch + 1]


def read_settings(workdir: str, overrides: Sequence[str]) -> ConfigDict:
    """A run's config with overrides of what sampling may change.

    Raises:
      UserError: no run, a key that is none or that sampling must not change.
    """
    saved = read_config(workdir)
    config = configuration.override(saved, overrides)
    before = dict(configuration.flatten(saved))
    for key, value in configuration.flatten(config):
        if value != before[key] and not key.startswith(CHANGEABLE):
            raise UserError(
                f"config.{key} is part of the run: sampling can change "
                "config.sampling.*, config.seed, config.vae"
            )
    configuration.check(config)
    return config


def open_run(
    workdir: str, config: ConfigDict, weights: str, step: int | None
) -> Generator:
    """A run's weights ("ema" or "raw") and its VAE, on all devices.

    config: as `read_settings` gives it. step: of the checkpoint, the newest by default.

    Raises:
      UserError: no such run or checkpoint, or no such VAE.
    """
    vae, vae_params = load_vae(config.vae)
    params, step = restore_weights(workdir, config, weights, step)
    mesh = make_mesh(-1, 1, batch_size=jax.device_count())
    facts = {"run": workdir, "step": step, "weights": weights, "versions": versions()}
    vae_params = jax.device_put(vae_params, replicated(mesh))
    return Generator(config, mesh, vae, vae_params, params, describe(config, **facts))


def batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Images sampled at a time: a multiple of the devices."""
    return -(-config.sampling.batch_size // mesh.size) * mesh.size


def describe(config: ConfigDict, **more: Any) -> dict[str, Any]:
    """What made a set of samples, for the file it goes to."""
    keys = dict(configuration.flatten(config))
    return {
        "config": config.name,
        **more,
        "seed": config.seed,
        "vae": config.vae,
        **{k.partition(".")[2]: keys[k] for k in keys if k.startswith("sampling.")},
        "resolution": config.data.resolution,
        "num_classes": config.data.num_classes,
    }


def refuse_others(
    where: Any, saved: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Refuse to go on with samples that have other settings than those to be made.

    Raises:
      UserError: the first setting that differs, of those that matter.
    """
    now = json.loads(json.dumps(settings))
    for key in sorted((now.keys() | saved.keys()) - {*WITHOUT_EFFECT}):
        if now.get(key) != saved.get(key):
            raise UserError(
                f"{where} has samples with other settings: {key} is "
                f"{saved.get(key)!r} there, {now.get(key)!r} now: use another --out or "
                "remove it"
            )


def grid(images: np.ndarray, columns: int, border: int = 2) -> np.ndarray:
    """uint8 images (N, H, W, 3), row by row, to one picture on white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    out = np.full(
        (rows * (h + border) + border, columns * (w + border) + border, c), 255, "uint8"
    )
    for i, image in enumerate(images):
        y = border + i // columns * (h + border)
        x = border + i % columns * (w + border)
        out[y : y + h, x : x + w] = image
    return out
