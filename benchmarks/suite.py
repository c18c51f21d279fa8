"""Everything that is to be measured on one accelerator, in one command.

    python -m benchmarks.suite --out=results [--only=train] [--dry_run]

Golden files first, then training, sampling, encoding and, where PyTorch is installed,
the peer; each a command of its own, whose text and JSON go to the folder. One that
fails or takes too long does not stop the others. Runs without TensorFlow.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

from sra2_jax.command import run_program
from sra2_jax.errors import UserError

XL = "--config=configs/sra2_xl.py"
FAST = "--config.model.scan=false --config.model.remat=none"
# Name -> module and flags; the targets stand in docs/benchmarks.md.
COMMANDS = {
    "verify": "sra2_jax verify tests/golden",
    "train_xl": f"benchmarks.train_step {XL} {FAST} --batch_size=256",
    "train_xl_scan": f"benchmarks.train_step {XL} --batch_size=256",
    "train_xl_512": (
        f"benchmarks.train_step --config=configs/sra2_xl_512.py {FAST} --batch_size=64"
    ),
    "train_sizes": f"benchmarks.train_step --sizes=S,B,L {FAST} --batch_size=256",
    "sampling": f"benchmarks.sampling {XL} --batch_size=128 --rounds=1",
    "encoding": "benchmarks.encoding --batch_sizes=32,128",
    "peer_b": "benchmarks.peer --config=configs/sra2_b.py --batch_size=256",
    "peer_xl": f"benchmarks.peer {XL} --batch_size=128",
}


def run(name: str, words: list[str], out: Path, limit: float) -> bool:
    """Run one command, showing its text and keeping it; whether it ended well."""
    print(f"== {name}: {shlex.join(words)}", flush=True)
    began, said = time.perf_counter(), out / f"{name}.txt"
    with said.open("w") as file:
        try:
            done = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
            end = "" if done.returncode == 0 else f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit:.0f} s"
    print(said.read_text().rstrip())
    print(f"== {name}: {end or 'ok'}, {time.perf_counter() - began:.0f} s", flush=True)
    return not end


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for texts and JSON")
    add("--only", default="", help="commands whose name begins so")
    add("--limit", type=float, default=600, help="seconds for each (%(default)s)")
    add("--dry_run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    chosen = {k: v for k, v in COMMANDS.items() if k.startswith(arguments.only)}
    if not chosen:
        raise UserError(f"--only={arguments.only}: known are {', '.join(COMMANDS)}")
    if not importlib.util.find_spec("torch"):
        missing = [name for name in chosen if name.startswith("peer")]
        chosen = {k: v for k, v in chosen.items() if k not in missing}
        if missing:
            print(f"no torch here, left out: {', '.join(missing)}")
    if not arguments.dry_run:
        arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, text in chosen.items():
        words = [sys.executable, "-m", *text.split()]
        if name != "verify":
            words.append(f"--json={arguments.out / name}.json")
        if arguments.dry_run:
            print(shlex.join(words))
        elif not run(name, words, arguments.out, arguments.limit):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    run_program(main)
