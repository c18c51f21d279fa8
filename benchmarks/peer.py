"""Time our training step against a PyTorch peer of the same program, by turns.

    python -m benchmarks.peer --batch_size=4 --torch_python=PATH

The peer is `benchmarks/peer_torch.py`: SiT with SRA 2's head, trained as the field's
scripts do (eager) and with PyTorch's own speed-ups (tuned). PyTorch may live in another
interpreter. Every side is a live process on the same device; one runs at a time and the
order rotates from round to round. Before anything is timed, the sides must agree, in
float32 on copied random weights, on velocity, loss and gradient norm, to 1e-4.

Times over ours are of the same round: above 1, ours is faster. On a GPU the live
processes share its memory: where that is short, take a smaller batch, fewer modes, or
--config.model.remat=dots. Status 1: the sides are not the same program.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from sra2_jax.command import Parser, run_program, writable
from sra2_jax.config import Config
from sra2_jax.errors import UserError

ROOT = Path(__file__).parents[1]
MODES = ("ours", "eager", "tuned")
TOLERANCE = 1e-4
# What the peer computes; another value would be another program.
PEER = {
    "transport.path": "linear",
    "transport.prediction": "velocity",
    "transport.time": "uniform",
    "model.learn_sigma": False,
    "align.vae.enabled": True,
    "align.vae.loss": "smooth_l1",
    "align.vae.schedule": "constant",
    "align.vae.zscore": False,
    "align.vae.t_min": 0.0,
    "align.vae.t_max": 1.0,
    "align.vae.head_final_layer": False,
    "align.encoder.enabled": False,
    "align.teacher.enabled": False,
    "optim.warmup_steps": 0,
    "accumulate": 1,
}


class Process:
    """A live worker; `ask` blocks until it has answered.

    Raises:
      UserError: the interpreter does not start, lacks a library, or a request fails.
    """

    def __init__(self, name: str, python: str, kind: str) -> None:
        self.name, self.python = name, python
        # JAX would take three quarters of a GPU's memory at once.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peer_worker", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for the program, not for workers
            )
        except OSError as error:
            raise UserError(f"{python} does not start: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # and the compiler's helpers
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name}: {self.python} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        if module := answer.get("lacks"):
            raise UserError(
                f"{self.python} has no {module}: --torch_python=PATH names an "
                "interpreter that has it, --modes=ours does without"
            )
        if error := answer.get("error"):
            raise UserError(f"{self.name}: {error}")
        return answer


def parse() -> tuple[argparse.Namespace, Config]:
    """The flags, and the checked config with one reader a batch.

    Raises:
      UserError: a flag or a config that cannot work.
    """
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default=",".join(MODES), help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, help="(the config's)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="compute type (float32 on a CPU, else the config's; eager: float16)",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a round and mode")
    parser.add_argument("--torch_python", default=sys.executable, metavar="PATH")
    parser.add_argument(
        "--json", type=writable, metavar="FILE", help="write the figures there"
    )
    arguments, config = parser.parse_config("sra2_s")
    arguments.modes = arguments.modes.split(",")
    unknown = set(arguments.modes) - set(MODES)
    if unknown or "ours" not in arguments.modes:
        raise UserError("--modes must name ours, and any of eager and tuned")
    for flag in ("rounds", "steps"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} must be at least 1")
    given = arguments.batch_size
    rows = config.batch_size if given is None else given
    config = config.override({"batch_size": rows})
    flat = config.flat()
    for key, value in PEER.items():
        if flat[key] != value:
            raise UserError(f"config.{key}={flat[key]!r}: the peer has only {value!r}")
    return arguments, config


@contextlib.contextmanager
def workers(modes: list[str], torch_python: str) -> Iterator[dict[str, Process]]:
    """Live workers by mode; they end with the block."""
    with contextlib.ExitStack() as stack:
        yield {
            mode: stack.enter_context(
                Process(mode, sys.executable, "jax")
                if mode == "ours"
                else Process(mode, torch_python, "torch")
            )
            for mode in modes
        }


def same_device(facts: dict[str, dict[str, Any]]) -> str:
    """The kind of device that all sides run on.

    Raises:
      UserError: they run on different kinds.
    """
    kinds = {mode: f["device"] for mode, f in facts.items()}
    if len(set(kinds.values())) > 1:
        where = ", ".join(f"{mode} on {kind}" for mode, kind in kinds.items())
        raise UserError(f"{where}: hide the GPU from all with CUDA_VISIBLE_DEVICES=")
    return kinds["ours"]


def difference(
    live: dict[str, Process], config: Config, folder: Path
) -> dict[str, tuple[float, str]]:
    """Each peer's error against ours where it is largest, and of what it is.

    Relative to the largest value: of the velocity, the loss, the gradient's norm.
    """
    found, ours, weights = {}, {}, folder / "weights.npz"
    for mode in ["ours", *(m for m in live if m != "ours")]:  # ours writes the weights
        out = folder / f"{mode}.npz"
        files = {"weights": str(weights), "out": str(out)}
        live[mode].ask("check", config=config.to_dict(), **files)
        with np.load(out, allow_pickle=False) as file:
            values = {key: file[key] for key in ("velocity", "loss", "grad_norm")}
        ours = ours or values
        errors = [
            (float(np.abs(values[k] - v).max() / np.abs(v).max()), k)
            for k, v in ours.items()
        ]
        # A NaN, which compares as neither larger nor smaller, has to win.
        found[mode] = max(errors, key=lambda e: np.inf if np.isnan(e[0]) else e[0])
    weights.unlink()
    del found["ours"]
    return found


def spread(values: Any) -> list[float]:
    """Median, smallest and largest."""
    values = np.asarray(values)
    return [float(f(values)) for f in (np.median, np.min, np.max)]


def take_turns(
    live: dict[str, Process], rounds: int, steps: int
) -> dict[str, list[dict[str, Any]]]:
    """What each mode answered in each round; the order rotates."""
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in live}
    modes = list(live)
    for number in range(rounds):
        first = number % len(modes)
        for mode in modes[first:] + modes[:first]:
            answers[mode].append(live[mode].ask("run", steps=steps))
    return answers


def summarise(
    answers: dict[str, list[dict[str, Any]]], batch_size: int
) -> list[dict[str, Any]]:
    """A row for each mode; [median, smallest, largest] over the rounds."""
    table = {
        key: {m: np.array([a[key] for a in rows]) for m, rows in answers.items()}
        for key in ("seconds", "cpu_seconds")
    }
    wall, cpu = table["seconds"], table["cpu_seconds"]
    return [
        {
            "case": "peer",
            "mode": mode,
            "seconds": spread(wall[mode]),
            "cpu_seconds": spread(cpu[mode]),
            "images_per_second": spread(batch_size / wall[mode]),
            "time_over_ours": spread(wall[mode] / wall["ours"]),
            "cpu_over_ours": spread(cpu[mode] / cpu["ours"]),
            "loss": rows[-1]["loss"],
            "peak_bytes": rows[-1]["peak_bytes"],
        }
        for mode, rows in answers.items()
    ]


def show(rows: list[dict[str, Any]], device: str) -> None:
    """Print the table; CPU seconds say something where the CPU computes."""
    keys = ["seconds", "images_per_second", "time_over_ours"]
    if device == "cpu":
        keys += ["cpu_seconds", "cpu_over_ours"]
    print("".join(f"{text:<26}" for text in ("mode", *keys, "last loss")).rstrip())
    for row in rows:
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*row[key])
            if row[key][0] < 100
            else "{:.1f} [{:.1f}, {:.1f}]".format(*row[key])
            for key in keys
        ]
        cells = [row["mode"], *cells, f"{row['loss']:.4f}"]
        if row["peak_bytes"]:
            cells[-1] += f", peak {row['peak_bytes'] / 1e9:.1f} GB"
        print("".join(f"{cell:<26}" for cell in cells).rstrip())


def describe(
    config: Config, facts: dict[str, dict[str, Any]]
) -> dict[str, str | int | bool | list[str]]:
    """What the figures depend on besides the program."""
    return {
        "config": config.name,
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "scan": config.model.scan,
        "remat": config.model.remat,
        "device": facts["ours"]["name"],
        "cpus": len(os.sched_getaffinity(0)),
        "versions": list(dict.fromkeys(f["text"] for f in facts.values())),
    }


def compare(
    live: dict[str, Process], arguments: argparse.Namespace, config: Config
) -> int:
    """Check, time by turns, print and write; the program's status."""
    facts = {mode: worker.ask("facts") for mode, worker in live.items()}
    device = same_device(facts)
    own = "float32" if device == "cpu" else config.model.dtype
    config = config.override({"model.dtype": arguments.dtype or own})
    about = describe(config, facts)
    for key, value in about.items():
        print(f"{key}: {'; '.join(value) if isinstance(value, list) else value}")
    with tempfile.TemporaryDirectory() as name:
        errors = difference(live, config, Path(name))
        for mode, (error, key) in errors.items():
            if not error <= TOLERANCE:
                print(
                    f"error: {mode} is not the same program as ours: its {key} is "
                    f"{error:.2g} off, {TOLERANCE:g} allowed",
                    file=sys.stderr,
                )
                return 1
            print(f"{mode} agrees with ours to {error:.1g} ({key})", flush=True)
        batch = f"{name}/batch.npz"
        live["ours"].ask("prepare", config=config.to_dict(), batch=batch)
        for mode in errors:
            dtype = config.model.dtype
            live[mode].ask("prepare", mode=mode, dtype=dtype, batch=batch)
    answers = take_turns(live, arguments.rounds, arguments.steps)
    rows = summarise(answers, config.batch_size)
    show(rows, device)
    print(f"of one step, median [min, max] of {arguments.rounds} rounds")
    if arguments.json:
        about |= {"rounds": arguments.rounds, "steps": arguments.steps}
        about |= {"load": round(os.getloadavg()[0], 1)}
        with arguments.json.open("w") as file:
            for row in rows:
                error = (
                    {"error": errors[row["mode"]][0]} if row["mode"] in errors else {}
                )
                file.write(json.dumps(row | error | about) + "\n")
    return 0


def main() -> int:
    arguments, config = parse()
    with workers(arguments.modes, arguments.torch_python) as live:
        return compare(live, arguments, config)


if __name__ == "__main__":
    run_program(main)
