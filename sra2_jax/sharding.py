"""The mesh, and where every array of a training step lies on it: all of it here.

Three axes: `data` copies the state, `fsdp` splits it, both split the batch; `tensor`
splits attention heads and hidden channels.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sra2_jax import config
from sra2_jax.errors import UserError, explained

# (params, ema, frozen, draws, step) -> gradients of params, metrics
Gradients = Callable[..., Any]
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
ALL = config.Mesh()  # copies of the state on all devices
# What numbers rest on, whatever JAX's variables in the environment say.
PINNED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
}

# Smaller arrays are copied to every device: sharding them costs more than it saves.
MIN_SHARDED_SIZE = 2**16

# Name of a parameter -> mesh axes of its dimensions. Blocks are stacked: their first
# dimension is their number. What no rule names is split over fsdp along its largest
# dimension. Optimizer moments and EMA have their parameter's name and so its place.
INTO, OUT = r"(text_)?(qkv|mlp_in|gated_in|modulation)", r"(text_)?\w+_out"
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (rf"blocks/{INTO}/kernel$", (None, "fsdp", "tensor")),
    (rf"blocks/{INTO}/bias$", (None, "tensor")),
    (rf"blocks/{OUT}/kernel$", (None, "tensor", "fsdp")),
    # MMDiT's last block lies alone.
    (rf"last/{INTO}/kernel$", ("fsdp", "tensor")),
    (rf"last/{INTO}/bias$", ("tensor",)),
    (rf"last/{OUT}/kernel$", ("tensor", "fsdp")),
    # Small; a lookup in a split table would cost an exchange of the whole batch.
    (r"label/embedding$", (None, None)),
)


def make_mesh(
    section: config.Mesh = ALL, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The ("data", "fsdp", "tensor") mesh over `devices`, all of them by default.

    Raises UserError: no devices, or the section does not fit them or the processes.
    """
    for name, value in PINNED.items():
        jax.config.update(name, value)
    advice = "see JAX_PLATFORMS, or install the extra of your accelerator"
    with explained("JAX finds no device", advice, (RuntimeError, AssertionError)):
        devices = devices or jax.devices()
    data, fsdp, tensor = section.data, section.fsdp, section.tensor
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} x "
            f"config.mesh.tensor={tensor} must be the number of devices, {len(devices)}"
        )
    if jax.process_count() > 1 and jax.local_device_count() % tensor:
        own = f"the {jax.local_device_count()} devices of a process"
        raise UserError(f"{section.given('tensor')} must divide {own}")
    # Auto: explicit axes, make_mesh's default, make FSDP parameters fail in Dense.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor), AXES, auto, devices=devices)


def mesh(config: config.Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config trains on. Raises UserError: as `make_mesh`, or its batch
    does not divide over it."""
    made = make_mesh(config.mesh, devices)
    parts = made.shape["data"] * made.shape["fsdp"]
    if config.batch_size % (parts * config.accumulate):
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by {parts} devices"
            f" x config.accumulate={config.accumulate}"
        )
    return made


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rounded(count: int, parts: int) -> int:
    """The next multiple of `parts`."""
    return -(-count // parts) * parts


def spread(rows: np.ndarray, size: int, mesh: Mesh) -> Array:
    """Rows that every process has, filled up with copies of the last one to `size`, a
    multiple of the devices, and split like a batch: one shape, one compilation."""
    filled = rows[np.arange(size).clip(max=len(rows) - 1)]
    place = batch_sharding(mesh)
    return jax.make_array_from_callback(filled.shape, place, filled.__getitem__)


def within(mesh: Mesh) -> contextlib.AbstractContextManager[object]:
    """Inside, while a function is traced, `constrain` refers to `mesh`."""
    if mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Place an activation's dimensions on mesh axes; nothing outside of `within`.
    XLA might split tokens or channels to suit a parameter, and gather the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def placed(state: Any, mesh: Mesh) -> Any:
    """The abstract state (ShapeDtypeStructs) with a sharding for each leaf, by RULES;
    a dimension that its axis does not divide stays whole."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes: Sequence[str | None] = [None] * leaf.ndim
        if np.prod(leaf.shape) >= MIN_SHARDED_SIZE:
            axes = _axes(name, leaf.shape, mesh)
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return on(leaf, NamedSharding(mesh, PartitionSpec(*fits)))

    return jax.tree_util.tree_map_with_path(place, state)


def on(tree: Any, place: NamedSharding) -> Any:
    """ShapeDtypeStructs of a tree, all placed alike."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def _axes(name: str, shape: tuple[int, ...], mesh: Mesh) -> Sequence[str | None]:
    """The mesh axis, or None, of each dimension of a parameter."""
    for pattern, axes in RULES:
        if re.search(pattern, name):
            # Muon's momentum has one more: matrices side by side.
            more = (None,) * (len(shape) - len(axes))
            return *axes[:2], *more, *axes[2:]
    first = 1 if "blocks/" in name else 0
    split = [a for a in range(first, len(shape)) if shape[a] % mesh.shape["fsdp"] == 0]
    largest = max(split, key=lambda a: shape[a], default=None)
    return ["fsdp" if a == largest else None for a in range(len(shape))]


def accumulate(gradients: Gradients, n: int, mesh: Mesh) -> Gradients:
    """The mean of `gradients` over n micro-batches of every n-th row, one at a time."""
    if n == 1:
        return gradients
    spec = PartitionSpec(None, *batch_sharding(mesh).spec)
    place = NamedSharding(mesh, spec)

    def split(x: Array) -> Array:
        # Strided, so that each device's rows stay on it.
        x = jnp.moveaxis(x.reshape(len(x) // n, n, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, place)

    def accumulated(params: Any, ema: Any, frozen: Any, draws: Any, step: Array) -> Any:
        def of(part: Any) -> Any:
            return gradients(params, ema, frozen, part, step)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b / n, total, of(part)), None

        parts = jax.tree.map(split, draws)
        shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(jnp.zeros_like, shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    return accumulated
