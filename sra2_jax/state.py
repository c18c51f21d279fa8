"""The training state: arrays only, one tree, checkpointed whole."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra2_jax.alignment import KINDS, Alignment
from sra2_jax.attention import implementation
from sra2_jax.models.dit import DiT
from sra2_jax.models.heads import MLPHead, alignment_head
from sra2_jax.sharding import state_shardings


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on; randomness and data order follow from `step`.

    `params` and `ema` are {"network": DiT's tree, "heads": {name: head's tree}}.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def build_networks(config: ConfigDict) -> tuple[DiT, dict[str, MLPHead]]:
    """The backbone and, by name, the head of each alignment that is on."""
    m = config.model
    fields = dict(m, dtype=jnp.dtype(m.dtype))
    tokens = (config.latents.size // m.patch_size) ** 2
    fields["attention"] = implementation(
        m.attention, m.dtype, tokens, m.heads, m.width // m.heads
    )
    network = DiT(
        size=config.latents.size,
        channels=config.latents.channels,
        num_classes=config.data.num_classes,
        **fields,
    )
    features = {
        "vae": network.patch_size**2 * network.channels,
        "encoder": config.align.encoder.width,
        "teacher": network.width,
    }
    heads = {
        name: alignment_head(
            network.width,
            features[name],
            layers=spec.head_layers,
            hidden=spec.head_width,
            final_layer=spec.head_final_layer,
            dtype=network.dtype,
        )
        for name, spec in build_alignments(config).items()
    }
    return network, heads


def build_alignments(config: ConfigDict) -> dict[str, Alignment]:
    """The alignment terms that are on, by name."""
    alignments = {}
    for name, section in config.align.items():
        fields = section.to_dict()
        if fields.pop("enabled"):
            alignments[name] = KINDS[name](**fields)
    return alignments


def init_state(
    network: DiT,
    heads: dict[str, MLPHead],
    transform: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
    """Step 0; the EMA starts as a copy of the parameters."""
    x = jnp.zeros((1, network.size, network.size, network.channels))
    tokens = jnp.zeros((1, (network.size // network.patch_size) ** 2, network.width))
    c = jnp.zeros((1, network.width))
    keys = jax.random.split(key, 1 + len(heads))
    params = {
        "network": network.init(keys[0], x, jnp.zeros(1), jnp.zeros(1, int))["params"],
        "heads": {
            name: head.init(k, tokens, c)["params"]
            for k, (name, head) in zip(keys[1:], heads.items(), strict=True)
        },
    }
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, transform.init(params))


def create_sharded(
    config: ConfigDict, transform: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The abstract state with its shardings, and a function that makes step 0.

    No array exists before the function runs, and it makes each one in its place.
    """
    network, heads = build_networks(config)

    def init() -> TrainState:
        return init_state(network, heads, transform, jax.random.key(config.seed))

    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        shardings,
    )
    return abstract, jax.jit(init, out_shardings=shardings)


def count_parameters(tree: Any) -> int:
    """Numbers in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
