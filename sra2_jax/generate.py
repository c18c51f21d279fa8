"""From a trained network to pictures: sample latents, decode, round to uint8."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from sra2_jax import sampler
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.sharding import batch_sharding, replicated, within
from sra2_jax.state import build_networks
from sra2_jax.transport import Transport

Generate = Callable[[Any, np.ndarray, np.ndarray], Iterator[np.ndarray]]
# purposes of randomness while sampling; training folds in steps, which stay below
NOISE, LABELS = 2**31, 2**31 + 1


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
    transport = Transport(**config.transport)
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


def make_generate(
    config: ConfigDict, mesh: Mesh, vae: AutoencoderKL, vae_params: Any
) -> Generate:
    """(network params, indices (N,), labels (N,)) -> batches of uint8 (n, H, W, 3).

    A batch is on its way to the device before the one before it is handed out, so
    that whatever is done with that (files, features) costs the device no time.
    """
    run = make_sampler(config, mesh)
    rounding = config.sampling.rounding
    latents = config.latents

    @jax.jit
    def decode(vae_params: Any, z: Array) -> Array:
        raw = z / latents.scaling_factor + latents.shift_factor
        images: Any = vae.apply({"params": vae_params}, raw, method="decode")
        images = to_uint8(images, rounding)
        return jax.lax.with_sharding_constraint(images, replicated(mesh))

    batch = batch_size(config, mesh)

    def generate(
        params: Any, indices: np.ndarray, labels: np.ndarray
    ) -> Iterator[np.ndarray]:
        ahead = None
        for start in range(0, len(indices), batch):
            # The last batch is filled up with copies: one shape, one compilation.
            rows = np.arange(start, start + batch).clip(max=len(indices) - 1)
            z = run(
                params, indices[rows].astype(np.int32), labels[rows].astype(np.int32)
            )
            behind, ahead = ahead, decode(vae_params, z)
            if behind is not None:
                yield np.asarray(behind)
        if ahead is not None:
            yield np.asarray(ahead)[: (len(indices) - 1) % batch + 1]

    return generate


def batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Images sampled at a time: a multiple of the devices."""
    return -(-config.sampling.batch_size // mesh.size) * mesh.size


def describe(config: ConfigDict, **more: Any) -> dict[str, Any]:
    """What made a set of samples, for the file it goes to."""
    return {
        "config": config.name,
        **more,
        "seed": config.seed,
        "vae": config.vae,
        **config.sampling,
        "resolution": config.data.resolution,
        "num_classes": config.data.num_classes,
    }


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
