"""Time the encoding of images into latents, from memory: a VAE of SD's size.

    python -m benchmarks.encoding --batch_sizes=16,64 --resolution=256

Made-up images and random weights, through the class that `sra2_jax.data.encode` uses.
Runs without TensorFlow. Reading and decoding of image files is not in it.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax.command import Parser, run_program, writable
from sra2_jax.data.encode import Encoder, encoded
from sra2_jax.errors import UserError
from sra2_jax.models.vae import AutoencoderKL, VAEConfig
from tools.measure import machine, spread, write


def measure(
    encoder: Encoder, resolution: int, batch_size: int, batches: int
) -> dict[str, Any]:
    """Images a second through `encoded`, batch by batch after two to warm up."""
    draw = np.random.default_rng(0)
    image = draw.integers(256, size=(resolution, resolution, 3), dtype=np.uint8)
    count = batch_size * (batches + 2)
    rows = encoded(((i, image, 0) for i in range(count)), encoder, batch_size)
    seconds, began = [], 0.0
    for number, (_, arrays) in enumerate(rows):
        if number >= 2:
            seconds.append(time.perf_counter() - began)
        elif not np.isfinite(arrays["mean"]).all():
            raise UserError("latents of made-up images are not finite")
        began = time.perf_counter()
    return {
        "resolution": resolution,
        "batch_size": batch_size,
        "images_per_second": spread(batch_size / np.array(seconds)),
        "batches": len(seconds),
    }


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--batch_sizes", default="64", help="such as 16,64 (%(default)s)")
    add("--resolution", type=int, default=256, help="pixels (%(default)s)")
    add("--batches", type=int, default=5, help="timed for each (%(default)s)")
    add("--channels", default="128,256,512,512", help="of the VAE (%(default)s)")
    add("--dtype", default="", help="bfloat16 or float32 (bfloat16 on accelerators)")
    add("--json", type=writable, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    channels = tuple(map(int, arguments.channels.split(",")))
    module = AutoencoderKL(VAEConfig(block_out_channels=channels), dtype=dtype)
    pixels = jnp.zeros((1, arguments.resolution, arguments.resolution, 3))
    params = jax.jit(module.init)(jax.random.key(0), pixels)
    encoder, facts = Encoder(module, params["params"]), machine()
    print(f"{facts['devices']} x {facts['device']}, jax {facts['jax']}, {dtype}")
    rows = []
    for size in map(int, arguments.batch_sizes.split(",")):
        row = measure(encoder, arguments.resolution, size, arguments.batches)
        rows.append({"case": "encoding", "dtype": dtype, **row})
        rate = row["images_per_second"]
        print(
            f"{arguments.resolution} px, batch {size}: {rate['p50']:.3g} images/s "
            f"({rate['p10']:.3g} to {rate['p90']:.3g})",
            flush=True,
        )
    write(arguments.json, facts, rows)


if __name__ == "__main__":
    run_program(main)
