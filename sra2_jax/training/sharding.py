"""One mesh, and one rule that places every array of the training state on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sra2_jax.errors import UserError

# Smaller arrays are copied to every device: sharding them costs more than it saves.
MIN_SHARDED_SIZE = 2**16


def make_mesh(
    data: int,
    fsdp: int,
    batch_size: int,
    n: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The ("data", "fsdp") mesh over `devices`, all of them by default.

    Args:
      data: devices that hold copies of the state, -1 for all that are left.
      fsdp: devices that share one copy.
      batch_size, n: the batch and its micro-batches, checked for divisibility.

    Raises:
      UserError: the numbers do not fit the devices or the batch.
    """
    devices = devices or jax.devices()
    count = len(devices)
    if data == -1:
        data = max(count // fsdp, 1)
    if data * fsdp != count:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} must be the number of "
            f"devices, {count}"
        )
    if batch_size % (count * n):
        raise UserError(
            f"config.batch_size={batch_size} is not divisible by {count} devices x "
            f"config.accumulate={n}"
        )
    # Auto: explicit axes, make_mesh's default, make FSDP parameters fail in Dense.
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), auto, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: object, mesh: Mesh) -> object:
    """A sharding for each leaf of the abstract state (ShapeDtypeStructs).

    The largest axis that fsdp divides is sharded over fsdp, the first axis of stacked
    blocks (their number) excepted; small arrays are replicated. Optimizer moments and
    EMA have their parameter's shape and so its placement.
    """
    size = mesh.shape["fsdp"]

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        first = 1 if "blocks" in names else 0
        axes = [a for a in range(first, leaf.ndim) if leaf.shape[a] % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda a: leaf.shape[a])
        spec = ["fsdp" if a == largest else None for a in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, state)
