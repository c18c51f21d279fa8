"""Checkpoints of the reference PyTorch code, in and out: python -m sra2_jax convert.

    python -m sra2_jax convert import FILE --workdir=RUN --config=configs/sra2_xl.py
    python -m sra2_jax convert export RUN --out=FILE.safetensors
    python -m sra2_jax convert inception FILE --out=inception.safetensors
    python -m sra2_jax convert vae FILE --statistics=latents_stats.pt --out=FOLDER

FILE is a .pt, .pth or .ckpt (PyTorch reads these), a .safetensors or an .npz.
"""

import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sra2_jax
from sra2_jax import config_file
from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.command import Parser
from sra2_jax.config import Config
from sra2_jax.errors import UserError, one_line
from sra2_jax.programs.sample import add_weights
from sra2_jax.run import Run
from sra2_jax.sharding import make_mesh
from sra2_jax.step import Program, State
from sra2_jax.storage import new_file
from sra2_jax.weights import files
from sra2_jax.weights.inception import convert_inception
from sra2_jax.weights.sit import from_reference, reverse_time, to_reference
from sra2_jax.weights.tree import Params
from sra2_jax.weights.vae import convert_ldm

Trees = tuple[Params, dict[str, Params]]  # of a network and its heads


def import_file(
    file: Path,
    workdir: str,
    config: Config,
    step: int | None = None,
    reverse: bool = False,
    classes: int | None = None,
    resize: bool = False,
) -> None:
    """Make `workdir` a run at the file's step, and print what became of its parts; the
    other arguments are the flags of `convert import`.

    Raises UserError: an unusable file, a config that does not fit it, or a run that has
    checkpoints already. Nothing is left behind then.
    """
    run = Run(workdir)
    if run.checkpoints.exists() or run.folder.is_file():
        raise UserError(f"{run}: holds checkpoints already: use another --workdir")
    check_names(config)
    contents = files.read_file(file)
    reverse = reverse or contents.reverse
    if classes and config.text.encoder:
        raise UserError("--classes: captions have none")
    if classes:
        config = config.override({"data.num_classes": classes})
    step = contents.step or 1 if step is None else step
    if not 1 <= step <= config.steps:
        raise UserError(
            f"{file}: step {step} must lie between 1 and config.steps={config.steps}: "
            "set --config.steps or --step"
        )
    if contents.heads not in (None, config.model.heads):
        now = f"config.model.heads={contents.heads} (now {config.model.heads})"
        raise UserError(f"{file} does not fit the config: it needs --{now}")
    program = Program(config, make_mesh())
    sets: dict[str, Trees] = {}
    wanted = program.abstract.params["heads"]
    for name, weights in contents.sets.items():
        try:
            network, heads = from_reference(
                weights, program.network, wanted, HEAD_NAMES, bool(classes), resize
            )
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        sets[name] = _turned(network, config) if reverse else network, heads
    contents.sets.clear()  # the trees hold copies; at XL size that counts
    only = next(iter(sets.values()))
    raw, ema = sets.get("raw", only), sets.get("ema", only)
    state = _state(program, raw, ema, step, bool(classes))
    _write_run(run, state, config, step)
    both = ", taken for both raw and ema" if raw is ema else ""
    lines = [f"{file}: step {step}", f"{' and '.join(sets)} weights{both}"]
    found = raw[1].keys() | ema[1].keys()
    for name in sorted(found | wanted.keys()):
        fate = "loaded" if name in wanted else "left out, it is off in the config"
        if name not in found:
            fate = "not in the file, initialised afresh"
        lines.append(f"head of config.align.{name}: {fate}")
    if config.model.learn_sigma and not reverse:
        lines.append(
            "time: taken to run from data to noise; SiT's own code, where learn_sigma "
            "mostly comes from, runs the other way: --reverse_time"
        )
    if not contents.heads:
        lines.append(f"{config.model.given('heads')}: the file does not say")
    lines.append(f"written: {run.checkpoints / str(step)}; main.py goes on from it")
    print("\n  ".join(lines))


def check_names(config: Config) -> None:
    """Raise UserError where a run's networks have no names in SiT's files."""
    if config.text.train:
        raise UserError(
            f"{config.text.given('train')}: the encoder has no place in SiT's names"
        )


def _turned(network: Params, config: Config) -> Params:
    velocity = config.transport.prediction == "velocity"
    return reverse_time(network, config.model.time_scale, velocity)


def _state(program: Program, raw: Trees, ema: Trees, step: int, relabel: bool) -> State:
    """The state at `step`, with fresh optimizer moments, what heads are missing, and if
    so asked labels but for the null label."""
    state = program.start()
    wanted = state.params["heads"]

    def complete(network: Params, heads: dict[str, Params]) -> Any:
        if relabel:
            fresh = np.asarray(state.params["network"]["label"]["embedding"])[:-1]
            null = network["label"]["embedding"][-1:]
            network = network | {"label": {"embedding": np.concatenate([fresh, null])}}
        heads = wanted | ema[1] | raw[1] | heads
        return {"network": network, "heads": {name: heads[name] for name in wanted}}

    count = jnp.asarray(step, jnp.int32)
    # The learning rate follows the run's step; Adam's bias correction starts anew.
    opt_state = optax.tree_utils.tree_set(
        state.opt_state,
        lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
        count=count,
    )
    average = complete(*ema)
    averages = average | dict.fromkeys(program.others, average)
    state = State(count, complete(*raw), averages, opt_state)
    return jax.device_put(state, program.places)


def _write_run(run: Run, state: State, config: Config, step: int) -> None:
    """RUN/checkpoints/STEP, then RUN/config.json; neither if one fails."""
    made = run.checkpoints if run.folder.exists() else run.folder
    try:
        with Checkpoints(run, config.run) as checkpoints:
            checkpoints.save(step, state)
        run.write("config", config.to_dict())
    except Exception as error:  # Orbax and TensorStore raise many kinds
        made.rmtree(missing_ok=True)
        raise UserError(f"{run}: cannot be written ({one_line(error)})") from error


def export_run(
    workdir: str,
    out: str,
    weights: str = "ema",
    step: int | None = None,
    heads: bool = False,
    reverse: bool = False,
) -> None:
    """Write a run's weights in SiT's names, float32, and print what was written; the
    arguments are the flags of `convert export`.

    Raises UserError: `out` exists or is of another kind, no run or no such checkpoint.
    """
    path = new_file(out, *files.WRITTEN)
    run = Run(workdir)
    config = run.config()
    check_names(config)
    program = Program(config, make_mesh())
    where = program.weights(weights)
    with Checkpoints(run) as checkpoints:
        state = checkpoints.restore(program.abstract, step)
    found: Any = jax.device_get(reduce(getitem, where, vars(state)))
    network = found["network"]
    tensors = to_reference(
        _turned(network, config) if reverse else network,
        found["heads"] if heads else {},
        HEAD_NAMES,
        program.network,
    )
    notes = {
        "format": "pt",
        "sra2_jax": sra2_jax.__version__,
        "step": str(state.step),
        "weights": weights,
        "num_heads": str(config.model.heads),
        "time": files.REVERSED if reverse else "data to noise",
        "latents": json.dumps(config.to_dict()["latents"]),
    }
    files.write_file(path, tensors, notes)
    print(f"{out}: {weights} weights of step {state.step}, {len(tensors)} tensors")


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    out: dict[str, Any] = {"required": True, "metavar": "FILE"}
    out["help"] = " or ".join(files.WRITTEN)
    reverse: dict[str, Any] = {"dest": "reverse", "action": "store_true"}
    reverse["help"] = "FILE's time runs from noise to data, as in SiT's own code"

    importing = commands.add_parser("import", help="make a run of a checkpoint file")
    importing.epilog = "Any key of the config: --config.KEY=VALUE"
    importing.add_keys()
    add = importing.add_argument
    add("file", type=Path, metavar="FILE", help=".pt, .pth, .ckpt, .safetensors, .npz")
    add("--workdir", required=True, metavar="RUN", help="folder of the run to make")
    add("--config", required=True, help="config file that fits FILE")
    add("--step", type=int, help="training steps done (the file's, or 1)")
    add("--classes", type=int, help="fine-tune for so many, with new labels")
    add("--resize", action="store_true", help="fine-tune for another resolution")
    add("--reverse_time", **reverse)

    exporting = commands.add_parser("export", help="write weights in SiT's names")
    add_weights(exporting)
    add = exporting.add_argument
    add("--out", **out)
    add("--heads", action="store_true", help="with the alignment heads")
    add("--reverse_time", **reverse)

    inception = commands.add_parser("inception", help="FID's network, without PyTorch")
    add = inception.add_argument
    add("file", type=Path, metavar="FILE", help="torch-fidelity's .pth")
    add("--out", **out)

    vae = commands.add_parser("vae", help="an autoencoder of latent-diffusion's code")
    add = vae.add_argument
    add("file", type=Path, metavar="FILE", help="VA-VAE's .pt, or .safetensors, .npz")
    add("--out", required=True, metavar="FOLDER", help="new, as diffusers has it")
    add("--statistics", type=Path, metavar="FILE", help="mean and std of each channel")
    add("--scaling_factor", type=float, default=1.0, help="(%(default)s)")

    flags = vars(parser.parse_args())
    command = flags.pop("command")
    if command == "import":
        config = config_file.override(flags.pop("config"), flags.pop("overrides"))
        import_file(config=config, **flags)
    elif command == "export":
        export_run(**flags)
    elif command == "vae":
        convert_ldm(**flags)
    else:
        convert_inception(**flags)
