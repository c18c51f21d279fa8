"""The Inception network of FID, Inception Score, Precision and Recall.

Source: the TensorFlow graph of 2015-12-05 in the form of torch-fidelity's
`FeatureExtractorInceptionV3`, batch norms folded into the convolutions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

SIDE = 299  # of the network's input
SPATIAL = 7  # channels of the spatial features
Kernel = tuple[int, int]
# branch -> its convolutions: channels, then a kernel, or two side by side
Branches = Mapping[str, Sequence[tuple[int, Kernel] | tuple[int, Kernel, Kernel]]]

ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
ROW, COLUMN = (1, 7), (7, 1)
BLOCK_B: Branches = {
    "branch3x3": [(384, THREE)],
    "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
}
BLOCK_D: Branches = {
    "branch3x3": [(192, ONE), (320, THREE)],
    "branch7x7x3": [(192, ONE), (192, ROW), (192, COLUMN), (192, THREE)],
}
BLOCK_E: Branches = {
    "branch1x1": [(320, ONE)],
    "branch3x3": [(384, ONE), (384, (1, 3), (3, 1))],
    "branch3x3dbl": [(448, ONE), (384, THREE), (384, (1, 3), (3, 1))],
    "branch_pool": [(192, ONE)],
}


def block_a(pool: int) -> Branches:
    return {
        "branch1x1": [(64, ONE)],
        "branch5x5": [(48, ONE), (64, FIVE)],
        "branch3x3dbl": [(64, ONE), (96, THREE), (96, THREE)],
        "branch_pool": [(pool, ONE)],
    }


def block_c(c: int) -> Branches:
    return {
        "branch1x1": [(192, ONE)],
        "branch7x7": [(c, ONE), (c, ROW), (192, COLUMN)],
        "branch7x7dbl": [(c, ONE), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)],
        "branch_pool": [(192, ONE)],
    }


# name -> branches, and what its pooling is; "halve": every branch halves the grid
BLOCKS: Mapping[str, tuple[Branches, str]] = {
    "Mixed_5b": (block_a(32), "average"),
    "Mixed_5c": (block_a(64), "average"),
    "Mixed_5d": (block_a(64), "average"),
    "Mixed_6a": (BLOCK_B, "halve"),
    "Mixed_6b": (block_c(128), "average"),
    "Mixed_6c": (block_c(160), "average"),
    "Mixed_6d": (block_c(160), "average"),
    "Mixed_6e": (block_c(192), "average"),
    "Mixed_7a": (BLOCK_D, "halve"),
    "Mixed_7b": (BLOCK_E, "average"),
    "Mixed_7c": (BLOCK_E, "max"),  # torch-fidelity and the graph alike
}


class Outputs(NamedTuple):
    """Features of B images, float32."""

    pool: Float[Array, "b 2048"]  # of FID, Precision and Recall
    # of sFID: the first channels of Mixed_6d's 1x1 branch
    spatial: Float[Array, "b 17 17 7"]
    logits: Float[Array, "b 1008"]  # without bias, of the Inception Score


def resize_bilinear(
    images: Float[Array, "b h w c"], side: int
) -> Float[Array, "b s s c"]:
    """TensorFlow 1's: output i lies at i * size / side, between two pixels."""
    for axis in (1, 2):
        size = images.shape[axis]
        # float32, as TensorFlow: the weights of its kernel
        places = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = places.astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (places - low).reshape((side, 1, 1) if axis == 1 else (side, 1))
        below, above = (jnp.take(images, i, axis=axis) for i in (low, high))
        images = below + (above - below) * share
    return images


def convolution(
    x: Array, features: int, kernel: Kernel, name: str, **how: Any
) -> Array:
    """A convolution with ReLU, float32 on every device; in a compact method."""
    # "highest": accelerators round float32 products to bf16 or TF32 otherwise
    layer = nn.Conv(features, kernel, precision="highest", name=name, **how)
    return nn.relu(layer(x))


class Mixed(nn.Module):
    """Parallel branches over the same input, their channels side by side."""

    branches: Branches
    pool: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g v k"]:
        outputs = []
        for branch, layers in self.branches.items():
            y = x
            if branch == "branch_pool" and self.pool == "max":
                y = nn.max_pool(x, THREE, ONE, "SAME")
            elif branch == "branch_pool":
                y = nn.avg_pool(x, THREE, ONE, "SAME", count_include_pad=False)
            for i, (features, *kernels) in enumerate(layers, 1):
                halves = self.pool == "halve" and i == len(layers)
                how: Any = {"strides": 2, "padding": "VALID"} if halves else {}
                name = branch if len(layers) == 1 else f"{branch}_{i}"
                names = [name] if len(kernels) == 1 else [f"{name}a", f"{name}b"]
                parts = [
                    convolution(y, features, kernel, name, **how)
                    for name, kernel in zip(names, kernels, strict=True)
                ]
                y = jnp.concatenate(parts, axis=-1)
            outputs.append(y)
        if self.pool == "halve":
            outputs.append(nn.max_pool(x, THREE, (2, 2)))
        return jnp.concatenate(outputs, axis=-1)


class Inception(nn.Module):
    """The network; weights by `sra2_jax.weights.load_inception`."""

    @nn.compact
    def __call__(self, images: Num[Array, "b h w 3"]) -> Outputs:
        """images: 0 to 255, of any size."""
        x = resize_bilinear(images.astype(jnp.float32), SIDE)
        x = (x - 128) / 128
        x = convolution(x, 32, THREE, "Conv2d_1a_3x3", strides=2, padding="VALID")
        x = convolution(x, 32, THREE, "Conv2d_2a_3x3", padding="VALID")
        x = convolution(x, 64, THREE, "Conv2d_2b_3x3")
        x = nn.max_pool(x, THREE, (2, 2))
        x = convolution(x, 80, ONE, "Conv2d_3b_1x1")
        x = convolution(x, 192, THREE, "Conv2d_4a_3x3", padding="VALID")
        x = nn.max_pool(x, THREE, (2, 2))
        spatial = x
        for name, (branches, pool) in BLOCKS.items():
            x = Mixed(branches, pool, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL]
        pooled = x.mean(axis=(1, 2))
        classes = nn.Dense(1008, use_bias=False, precision="highest", name="fc")
        return Outputs(pooled, spatial, classes(pooled))
