"""SRA 2 in JAX/Flax: diffusion transformers aligned with their own VAE latents.

    import sra2_jax as sra

    config = sra.load("sra2_b", "data.dir=latents256", "align.vae.weight=0.5")
    program = sra.Program(config, sra.mesh(config))
    state, step = program.start(), program.compile()
    for batch in sra.batches(config, program):
        state, metrics = step(state, batch)
    images = sra.generate(program, state.ema, labels=[0, 1], guidance=1.8)

Each name is imported from its module, below, when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# The map of the house, in reading order: public name -> its module.
PUBLIC = {
    "Config": "config",  # every key of a run
    "load": "config_file",  # of a config file, with overrides
    "mesh": "sharding",  # where arrays lie
    "Transport": "transport",  # paths between data and noise
    "ALIGNMENTS": "alignment",  # a method is a file there
    "Program": "step",  # a config on a mesh: the loss, the update, compiled
    "batches": "train",  # of a dataset of latents; beside it, the whole job
    "sample": "sampler",  # Euler, Heun, Euler-Maruyama
    "Guidance": "sampler",
    "generate": "generator",  # images of a network
    "load_run": "hub",  # a network of a run, or of one on the hub
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
