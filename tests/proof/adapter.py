"""The only file of the proof that knows sra2_jax: what later code must compute alike.

A refactor writes the bodies anew and keeps names, arguments and results.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra2_jax import config_file, sampler
from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.config import Config
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.data.pipeline import Order, batches
from sra2_jax.generator import Generator, make_sampler
from sra2_jax.programs import convert
from sra2_jax.programs.verify import inception_weights
from sra2_jax.sharding import batch_sharding, make_mesh
from sra2_jax.step import Program
from sra2_jax.transport import Transport
from sra2_jax.weights import files, load_dinov2, load_vae, save_vae
from sra2_jax.weights.dinov2 import save_dinov2
from sra2_jax.weights.inception import from_torch_fidelity
from sra2_jax.weights.sit import from_reference, reverse_time, to_reference

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

# "section.key" -> value, over those of configs/NAME.py
Changes = dict[str, Any]
# data, fsdp and tensor; the first data * fsdp * tensor devices
Mesh = tuple[int, int, int]


def config_of(name: str, changes: Changes) -> Config:
    return config_file.load(name).override(changes)


def _program(name: str, changes: Changes, mesh: Mesh) -> Program:
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    config = config_of(name, changes)
    count = mesh[0] * mesh[1] * mesh[2]
    section = config.override(sizes).mesh
    return Program(config, make_mesh(section, jax.devices()[:count]))


# ---- part step


def lower_step(name: str, changes: Changes, mesh: Mesh) -> str:
    """StableHLO of the training step, (state, batch, encoder's parameters)."""
    return _program(name, changes, mesh).lower().as_text()


def lower_init(name: str, changes: Changes, mesh: Mesh) -> str:
    """StableHLO of what makes the state of step 0."""
    program = _program(name, changes, mesh)
    return jax.jit(program.init, out_shardings=program.places).lower().as_text()


def placed_leaves(name: str, changes: Changes, mesh: Mesh) -> Iterator[str]:
    """ "name dtype shape partition" of each leaf of the state."""
    state = _program(name, changes, mesh).abstract
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        key = jax.tree_util.keystr(path)
        yield f"{key} {leaf.dtype} {leaf.shape} {leaf.sharding.spec}"


# ---- part sampler


def lower_sampler(name: str, changes: Changes, mesh: Mesh) -> str:
    """StableHLO of sampling, (network's parameters, indices, labels) -> latents."""
    program = _program(name, changes, mesh)
    params = program.abstract.params["network"]
    rows = jax.ShapeDtypeStruct((program.config.sampling.batch_size,), jnp.int32)
    return make_sampler(program).lower(params, rows, rows).as_text()


def lower_decoder(name: str, changes: Changes, mesh: Mesh) -> str:
    """StableHLO of decoding, (the VAE's parameters, latents) -> uint8 pixels."""
    program = _program(name, changes, mesh)
    vae, params = load_vae("digits")
    shape = (program.config.sampling.batch_size, *program.config.latent_shape)
    place = batch_sharding(program.mesh)
    z = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Generator(program, vae, params)._decode.lower(params, z).as_text()


def sampling_times(path: str, method: str, steps: int) -> np.ndarray:
    return sampler.time_grid(method, steps, Transport(path=path))


# ---- part order


def encode_digits(folder: Path) -> None:
    """The training digits as a dataset of 8 shards."""
    options = {"images": "digits", "vae": "digits", "resolution": 32}
    encode(EncodeOptions(out=str(folder), store_images=True, **options))


def read_batches(
    folder: Path, count: int, fields: tuple[str, ...], **settings: int
) -> list[dict[str, Any]]:
    """The first `count` batches of one process, with `fields` besides.

    settings: batch_size, seed, start_step, streams, shuffle_buffer, process_index,
    process_count.
    """
    process = settings.pop("process_index"), settings.pop("process_count")
    start = settings.pop("start_step")
    stream = batches(folder, Order(**settings), start, fields, *process)
    return [next(stream) for _ in range(count)]


# ---- part quickstart


def checkpoint_leaves(workdir: Path, step: int) -> dict[str, Any]:
    """Fingerprint of each array of a checkpoint."""
    file = workdir / "checkpoints" / str(step) / "fingerprint" / "metadata"
    return json.loads(file.read_text())["leaves"]


# ---- part export


def seeded_state(name: str, changes: Changes) -> dict[str, Any]:
    """The tree {"network", "heads"}, made of numbers that depend on shapes alone."""
    params = _program(name, changes, (1, 1, 1)).abstract.params
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: draw.normal(size=s.shape).astype("float32"), params)


def export(
    tree: dict[str, Any], size: int, patch_size: int, reverse: bool
) -> dict[str, np.ndarray]:
    """The state dict of a network with its heads, in the reference's names."""
    network = reverse_time(tree["network"], 1.0, True) if reverse else tree["network"]
    return to_reference(
        network, tree["heads"], HEAD_NAMES, size=size, patch_size=patch_size
    )


def export_run(workdir: Path, out: Path, weights: str, heads: bool, reverse: bool):
    """The file of `convert export`: its state dict and what it says beside."""
    convert.export_run(str(workdir), out, weights, heads=heads, reverse=reverse)
    contents = files.read_file(out)
    return contents.sets, (contents.step, contents.heads, contents.reverse)


def import_state_dict(weights: dict[str, np.ndarray]) -> tuple[dict, Any]:
    """(settings, {"network", "heads"}) of a state dict of the reference."""
    settings, network, heads = from_reference(weights, HEAD_NAMES)
    return settings, {"network": network, "heads": heads}


def load_golden(name: str) -> tuple[dict, Any]:
    """(settings, tree) that a golden file loads to."""
    if name == "inception":
        data = dict(np.load(GOLDEN / "inception.npz"))
        return {}, from_torch_fidelity(inception_weights(data), Path(name))[1]
    if name in ("vae", "dinov2", "digits_vae", "digits_dinov2"):
        load = load_vae if "vae" in name else load_dinov2
        source = "digits" if "digits" in name else str(GOLDEN / name)
        module, params = load(source)
        return dataclasses.asdict(module.config), params
    data = np.load(GOLDEN / f"{name}.npz")
    return import_state_dict({k[2:]: data[k] for k in data if k.startswith("w/")})


def save_golden(name: str, folder: Path) -> None:
    """A golden folder loaded and saved again."""
    load, save = (load_vae, save_vae) if name == "vae" else (load_dinov2, save_dinov2)
    module, params = load(str(GOLDEN / name))
    save(folder, module.config, params)


def convert_inception(folder: Path) -> Path:
    """The file that `convert inception` makes of the golden weights, as .npz."""
    weights = inception_weights(dict(np.load(GOLDEN / "inception.npz")))
    files.write_file(folder / "in.npz", weights, {})
    convert.convert_inception(folder / "in.npz", folder / "out.safetensors")
    return folder / "out.safetensors"
