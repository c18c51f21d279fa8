"""Checkpoints of the reference PyTorch code, in and out: python -m sra2_jax convert.

    python -m sra2_jax convert import FILE --workdir=RUN --config=configs/sra2_xl.py
    python -m sra2_jax convert export RUN --out=FILE.safetensors
    python -m sra2_jax convert inception FILE --out=inception.safetensors

FILE is a .pt, .pth or .ckpt of SiT, REPA or SRA (PyTorch reads these), a .safetensors
or an .npz. Runs without TensorFlow.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

import sra2_jax
from sra2_jax import config as configuration
from sra2_jax.checkpoint import Checkpoints
from sra2_jax.errors import UserError, run_program
from sra2_jax.flags import Parser
from sra2_jax.optim import make_optimizer
from sra2_jax.restore import restore_run
from sra2_jax.sharding import make_mesh
from sra2_jax.state import TrainState, count_parameters, create_sharded
from sra2_jax.weights.files import (
    REVERSED,
    check_writable,
    first_line,
    read_file,
    write_file,
)
from sra2_jax.weights.inception import convert_inception
from sra2_jax.weights.sit import from_reference, reverse_time, to_reference

# what a file says of its network -> where the config says it
KEYS = {
    "size": "latents.size",
    "channels": "latents.channels",
    "num_classes": "data.num_classes",
    "patch_size": "model.patch_size",
    "width": "model.width",
    "depth": "model.depth",
    "heads": "model.heads",
    "mlp_ratio": "model.mlp_ratio",
    "learn_sigma": "model.learn_sigma",
}
# sets of weights that a file holds -> what is said of them
SAID = {
    ("raw", "ema"): "raw and EMA weights",
    ("raw",): "raw weights only, taken for the EMA too",
    ("ema",): "EMA weights only, taken for the raw ones too",
    ("one",): "one set of weights, taken for both raw and EMA",
}


def import_file(
    file: Path,
    workdir: str,
    config: ConfigDict,
    step: int | None = None,
    reverse: bool = False,
) -> None:
    """Make `workdir` a run at the file's step, and print what became of its parts.

    Args:
      step: in place of the file's own; 1 where neither says.
      reverse: the file's network runs from noise at 0 to data at 1 (SiT's code); a file
        of `export_run` says so itself.

    Raises:
      UserError: an unusable file, a config that does not fit it, or a run that has
        checkpoints already. Nothing is left behind then.
    """
    run = _vacant(workdir)
    contents = read_file(file)
    reverse = reverse or contents.reverse
    origin = "--step"
    if step is None:
        step = contents.step or 1
        origin = "the file's" if contents.step else "the file names none"
    if not 1 <= step <= config.steps:
        raise UserError(
            f"{file}: step {step} must lie between 1 and config.steps={config.steps}: "
            "set --config.steps or --step"
        )
    sets = {}
    for name, weights in contents.sets.items():
        try:
            settings, network, heads = from_reference(weights)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        if contents.heads:
            settings["heads"] = contents.heads
        _check_settings(file, settings, config)
        if reverse:
            velocity = config.transport.prediction == "velocity"
            network = reverse_time(network, config.model.time_scale, velocity)
        sets[name] = network, heads
    contents.sets.clear()  # the trees hold copies; at XL size that counts
    state, lines = _make_state(file, sets, config, step)
    _write_run(run, state, config, step)
    print(f"{file}: step {step} ({origin})")
    if config.model.learn_sigma and not reverse:
        lines.append(
            "time: taken to run from data to noise; SiT's own code, where learn_sigma "
            "mostly comes from, runs the other way: --reverse_time"
        )
    if not contents.heads:
        heads = config.model.heads
        lines.append(f"attention: config.model.heads={heads}, the file does not say")
    lines.append(f"written: {run / 'checkpoints' / str(step)}; main.py goes on from it")
    for line in lines:
        print(f"  {line}")


def _vacant(workdir: str) -> epath.Path:
    """The run's folder, refused if it holds checkpoints."""
    run = epath.Path(workdir).absolute()
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: not a folder: use another --workdir")
    folder = run / "checkpoints"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{run}: holds checkpoints already: use another --workdir")
    return run


def _check_settings(path: Path, settings: dict[str, Any], config: ConfigDict) -> None:
    """Refuse a config of another network than the file's."""
    flat = dict(configuration.flatten(config))
    wrong = []
    for name, key in KEYS.items():
        ours, theirs = flat[key], settings.get(name, flat[key])
        if name == "mlp_ratio":  # the file has a whole number of hidden channels
            fits = int(settings["width"] * ours + 1e-6) == round(
                settings["width"] * theirs
            )
        else:
            fits = ours == theirs
        if not fits:
            wrong.append(f"--config.{key}={theirs} (now {ours})")
    if wrong:
        raise UserError(f"{path} does not fit the config: it needs {', '.join(wrong)}")


def _make_state(
    path: Path, sets: dict[str, Any], config: ConfigDict, step: int
) -> tuple[TrainState, list[str]]:
    """The state at `step` with fresh optimizer moments, and what there is to say."""
    mesh = make_mesh(-1, 1, batch_size=jax.device_count())
    transform, _ = make_optimizer(**config.optim)
    abstract, init = create_sharded(config, transform, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    wanted = abstract.params["heads"]
    found: dict[str, Any] = {}
    for _, heads in sets.values():
        found = heads | found
        for name in heads.keys() & wanted.keys():
            _check_head(path, name, heads[name], wanted[name])
    missing = [name for name in wanted if name not in found]
    fresh = {}
    if missing:
        fresh = jax.jit(lambda: {n: init().params["heads"][n] for n in missing})()

    def complete(network: Any, heads: Any) -> Any:
        heads = {name: (found | fresh | heads)[name] for name in wanted}
        return jax.device_put({"network": network, "heads": heads}, placed.params)

    first = next(iter(sets))
    params, ema = (complete(*sets.get(name, sets[first])) for name in ("raw", "ema"))
    opt_state = jax.jit(transform.init, out_shardings=placed.opt_state)(params)
    # The learning rate follows the run's step; Adam's bias correction starts anew.
    schedule = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda s: schedule(jnp.full_like(s.count, step)) if type(s) is schedule else s,
        opt_state,
        is_leaf=lambda s: type(s) is schedule,
    )
    state = TrainState(jnp.asarray(step, jnp.int32), params, ema, opt_state)
    lines = [SAID[tuple(sets)], "optimizer moments: zero, they are not converted"]
    for name in sorted(wanted.keys() | found.keys()):
        fate = "loaded" if name in wanted else "left out, it is off in the config"
        if name in missing:
            fate = "not in the file, initialised afresh"
        lines.append(f"head of config.align.{name}: {fate}")
    return jax.device_put(state, placed), lines


def _check_head(path: Path, name: str, found: Any, wanted: Any) -> None:
    """Refuse a head of other layers than the config's."""
    a, b = (traverse_util.flatten_dict(tree, sep="/") for tree in (found, wanted))
    for key in (k for k in (*b, *a) if k.endswith("kernel")):
        shapes = [tree[key].shape if key in tree else "missing" for tree in (a, b)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path} does not fit config.align.{name}: {key} of its head is "
                f"{shapes[0]}, {shapes[1]} in the config: change its head_layers, "
                "head_width, head_final_layer or width, or turn it off"
            )


def _write_run(run: Any, state: TrainState, config: ConfigDict, step: int) -> None:
    """RUN/checkpoints/STEP, then RUN/config.json; neither if one fails."""
    folder, made = run / "checkpoints", not run.exists()
    try:
        checkpoints = Checkpoints(folder, config.run.keep_checkpoints)
        try:
            checkpoints.save(step, state)
        finally:
            checkpoints.close()
        (run / "config.json").write_text(configuration.to_json(config))
    except BaseException as error:
        (run if made else folder).rmtree(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise UserError(f"{run}: cannot be written ({first_line(error)})") from error


def export_run(
    workdir: str,
    out: Path,
    weights: str = "ema",
    step: int | None = None,
    heads: bool = False,
    reverse: bool = False,
) -> None:
    """Write a run's weights in SiT's names, float32, and print what was written.

    Args:
      out: new .safetensors or .npz; weights: "ema" or "raw".
      step: of the checkpoint, the newest by default.
      heads: with the alignment heads, see `reference.HEADS`.
      reverse: for code that runs from noise at 0 to data at 1 (SiT's).

    Raises:
      UserError: `out` exists or is of another kind, no run or no such checkpoint.
    """
    check_writable(out)
    config, state = restore_run(workdir, step)
    tree: Any = jax.device_get(state.ema if weights == "ema" else state.params)
    network = tree["network"]
    if reverse:
        velocity = config.transport.prediction == "velocity"
        network = reverse_time(network, config.model.time_scale, velocity)
    tensors = to_reference(
        network,
        tree["heads"] if heads else {},
        size=config.latents.size,
        patch_size=config.model.patch_size,
    )
    notes = {
        "format": "pt",
        "sra2_jax": sra2_jax.__version__,
        "step": str(int(state.step)),
        "weights": weights,
        "num_heads": str(config.model.heads),
        "time": REVERSED if reverse else "data to noise",
    }
    write_file(out, tensors, notes)
    print(
        f"{out}: {weights} weights of step {int(state.step)}, {len(tensors)} tensors, "
        f"{count_parameters(tensors):,} numbers"
    )


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the overrides --config.KEY=VALUE of an import."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, **texts: Any) -> Any:
        sub = commands.add_parser(name, **texts)
        if name != "inception":
            sub.add_argument(
                "--reverse_time",
                dest="reverse",
                action="store_true",
                help="FILE's time runs from noise to data, as in SiT's own code",
            )
        return sub.add_argument

    add = command(
        "import",
        help="make a run of a checkpoint file",
        epilog="Any key of configs/default.py: --config.KEY=VALUE",
    )
    add("file", type=Path, metavar="FILE", help=".pt, .pth, .ckpt, .safetensors, .npz")
    add("--workdir", required=True, metavar="RUN", help="folder of the run to make")
    add("--config", required=True, help="config file that fits FILE")
    add("--step", type=int, help="training steps done (the file's, or 1)")

    add = command("export", help="write a run's weights in SiT's names")
    add("workdir", metavar="RUN", help="folder of a run")
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors or .npz")
    add("--weights", choices=("ema", "raw"), default="ema", help="(%(default)s)")
    add("--step", type=int, help="of the checkpoint (the newest)")
    add("--heads", action="store_true", help="with the alignment heads")

    add = command("inception", help="weights of FID's network, without PyTorch")
    add("file", type=Path, metavar="FILE", help="torch-fidelity's .pth")
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors or .npz")

    arguments, rest = parser.parse_known_args()
    if rest and arguments.command != "import":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments, rest


def main() -> None:
    arguments, overrides = _arguments()
    flags = vars(arguments)
    command = flags.pop("command")
    if command == "export":
        export_run(**flags)
        return
    if command == "inception":
        convert_inception(**flags)
        return
    config = configuration.load(flags.pop("config"), overrides)
    configuration.check(config)
    import_file(config=config, **flags)


if __name__ == "__main__":
    run_program(main)
