"""Everything that is to be measured on one GPU, in parts of ten minutes.

    python -m benchmarks.gpu.session B A C --out=results [--budget=570] [--dry_run]

A: golden files, numerics, a quickstart run, SiT-B/2. B: SiT-XL/2, methods and memory.
C: PyTorch on the same card. D: sampling, encoding, kernels of a step, 512 px and other
sizes. E: the study's images, networks and plans (docs/evidence.md); `study`, then
`gain`, named alone go on where they were. Each step is a command of its own, whose text
and JSON go to the folder at once. One that fails, takes longer than its limit or finds
too little left of the budget does not stop the others. --smoke shrinks every step, to
try them on a CPU.
"""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sra2_jax.command import Parser, run_program
from sra2_jax.errors import UserError

# cuBLAS alone: Triton's products are hundreds of kernels to compile and to time.
FAST = "--xla_gpu_enable_triton_gemm=false"
# A profile names its kernels; of trainings beside each other graphs ended some.
UNGRAPHED = f"{FAST} --xla_gpu_enable_command_buffer="
LEFT = 20  # seconds, under which no step is begun
OFF = "align.vae.enabled=false"
REPA = f"{OFF} align.encoder.enabled=true align.encoder.source=features"
SRA = f"{OFF} align.teacher.enabled=true"
PLAIN = "model.scan=false model.remat=none"
FLAGS = " ".join(f"--config.{key}" for key in PLAIN.split())


@dataclass(frozen=True)
class Step:
    """A command of a part, at most `limit` seconds; `json`: it writes its figures."""

    part: str
    limit: int
    words: str
    variants: tuple[str, ...] = ()
    xla: str = FAST
    json: bool = True


def plan(name: str) -> tuple[str, ...]:
    """The study's processes, one for each seed."""
    words = f"benchmarks.study {name} --data={{data}} --out={{out}}/{name}"
    return tuple(f"{words} --budget={{left}} --seed={seed}" for seed in range(3))


# {XL}, {B}: configs; {n}, {half}, {large}: batches of XL; {rounds}.
VARIANTS = "benchmarks.gpu.variants {XL} --rounds={rounds} --threads=6 --seconds=410"
SMALL = "benchmarks.gpu.variants {B} --rounds={rounds}"
SIZES = "benchmarks.train_step {sizes} --rounds={rounds}"
PEER = "benchmarks.peer --rounds={rounds}"  # three processes share the memory
SAMPLING = "benchmarks.sampling {XL} --batch_size={half} --rounds=1 {sampling}"
IMAGES = "{data}/train --held_out={data}/test --out={data}"
KERNELS = "benchmarks.gpu.kernels {XL} --batch_size={n}"
STEPS = {
    "xl": Step(
        "B",
        430,
        VARIANTS,
        (
            f"sra2 {{n}}: batch_size={{n}} {PLAIN}",
            f"vanilla {{n}}: batch_size={{n}} {PLAIN} {OFF}",
            "sra2 {n} attention: batch_size={n} model.scan=false model.remat=attention",
            "sra2 {n} scan dots: batch_size={n} model.scan=true model.remat=dots",
            f"repa {{n}}, features: batch_size={{n}} {PLAIN} {REPA}",
            f"sra {{n}}: batch_size={{n}} {PLAIN} {SRA}",
            f"sra2 {{half}}: batch_size={{half}} {PLAIN}",
            f"sra2 {{large}}: batch_size={{large}} {PLAIN}",
        ),
    ),
    "xl_triton": Step(
        "B",
        150,
        VARIANTS,
        (f"sra2 {{n}}, Triton's products too: batch_size={{n}} {PLAIN}",),
        xla="",
    ),
    "verify": Step("A", 200, "sra2_jax verify tests/golden", json=False),
    "numerics": Step(
        "A", 150, "benchmarks.gpu.numerics {B} --batch_size={rows} --tokens={tokens}"
    ),
    "quickstart": Step(
        "A", 200, "main --workdir={out}/quickstart {run}", (), "", False
    ),
    "small": Step(
        "A",
        120,
        SMALL,
        (
            f"B/2 sra2: batch_size={{n}} {PLAIN}",
            f"B/2 vanilla: batch_size={{n}} {PLAIN} {OFF}",
        ),
    ),
    "peer_xl": Step("C", 430, f"{PEER} {{XL}} --batch_size={{peer}} {FLAGS}"),
    "peer_b": Step("C", 200, f"{PEER} {{B}} --batch_size={{n}} {FLAGS}"),
    "sampling": Step("D", 150, f"{SAMPLING} --config.sampling.dtype=bfloat16"),
    "sampling_float32": Step("D", 240, SAMPLING),
    "encoding": Step("D", 100, "benchmarks.encoding {encoding}"),
    "kernels": Step("D", 150, f"{KERNELS} {FLAGS}", xla=UNGRAPHED),
    "xl_512": Step(
        "D",
        300,
        "benchmarks.gpu.variants {XL512} --rounds={rounds}",
        (f"sra2 512 px: batch_size={{px512}} {PLAIN}",),
    ),
    "sizes": Step("D", 300, f"{SIZES} --batch_size={{n}} {FLAGS}"),
    # Would a study's seeds train faster in one program?
    "seeds": Step("D", 120, f"benchmarks.gpu.seeds {{S}} {FLAGS}"),
    "images": Step(
        "E",
        200,
        "benchmarks.study.data textures --out={data} --packages={packages} {crops}",
        json=False,
    ),
    "networks": Step(
        "E",
        400,
        "benchmarks.gpu.beside",
        (
            f"tools.train_vae {IMAGES}/vae {{vae}}",
            f"tools.train_encoder {IMAGES}/encoder {{encoder}}",
            f"tools.train_encoder {IMAGES}/judge --seed=1 {{encoder}}",
        ),
        json=False,
    ),
    "latents": Step(
        "E",
        120,
        "sra2_jax encode --images={data}/train --out={data}/latents --vae={data}/vae "
        "--resolution=64 --statistics=computed --mirror --encoder={data}/encoder "
        "--grid=8",
        json=False,
    ),
    "study": Step("E", 560, "benchmarks.gpu.beside", plan("{plan}"), UNGRAPHED, False),
    "gain": Step("E", 560, "benchmarks.gpu.beside", plan("{gain}"), UNGRAPHED, False),
}
FULL = {
    "XL": "--config=configs/sra2_xl.py",
    "XL512": "--config=configs/sra2_xl_512.py",
    "B": "--config=configs/sra2_b.py",
    "n": "256",
    "half": "128",
    "peer": "64",
    "large": "320",
    "px512": "64",
    "rows": "32",
    "tokens": "256,1024",
    "rounds": "7",
    "run": "--config.run.sample_every=100000",
    "sampling": "--config.sampling.steps=50",
    "encoding": "--batch_sizes=32,128",
    "sizes": "--sizes=S,B,L",
    "S": "--config=configs/sra2_s.py --config.data.resolution=64 "
    "--config.latents.size=16",
    "packages": "runs/study/photographs",
    "crops": "",
    "vae": "--widths=32,64,128 --batch_size=64 --steps=3000",
    "encoder": "--steps=3000",
    "plan": "textures_gpu",
    "gain": "gain_gpu",
}
CARDS = {
    "h200": {},
    "h100": {"n": "192", "half": "96", "peer": "32", "large": "224", "px512": "40"},
}
TINY = "--config=configs/digits.py"
SMOKE = {
    "XL": TINY,
    "XL512": TINY,
    "B": TINY,
    "n": "8",
    "half": "4",
    "peer": "4",
    "large": "16",
    "px512": "4",
    "rows": "4",
    "tokens": "16",
    "rounds": "1",
    "run": "--config.steps=20 --config.eval.num_samples=20 --config.sampling.steps=4",
    "sampling": "--config.sampling.steps=4",
    "encoding": "--batch_sizes=1 --batches=1 --resolution=32 --channels=32,32,32,32",
    "sizes": TINY,
    "S": f"{TINY} --rounds=1",
    "packages": "runs/study/photographs",
    "crops": "--crops=24",
    "vae": "--widths=8,8,8 --batch_size=2 --steps=2",
    "encoder": "--batch_size=4 --steps=2",
    "plan": "smoke",
    "gain": "smoke",
}


def command(name: str, values: dict[str, str], out: Path, left: float) -> list[str]:
    """The words of a step, which may take `left` seconds."""
    step = STEPS[name]
    # What stops by itself keeps some seconds to write down what it found.
    budget = min(left, step.limit) - 60
    values = values | {
        "out": str(out),
        "data": str(out / "data"),
        "left": f"{budget:.0f}",
    }
    words = step.words.format_map(values).split()
    words += [text.format_map(values) for text in step.variants]
    words += [f"--json={out / name}.json"] if step.json else []
    return [sys.executable, "-m", *words]


def run(name: str, words: list[str], out: Path, limit: float) -> bool:
    """Run one command, showing its text and keeping it; whether it ended well."""
    print(f"== {name} (at most {limit:.0f} s): {shlex.join(words)}", flush=True)
    began, flags = time.perf_counter(), os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} {STEPS[name].xla}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    # One place for all steps: what is compiled once is not compiled again.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        (out / f"{name}.txt").open("wb") as file,
        # With its own processes, to be stopped together.
        subprocess.Popen(
            words, env=environment, start_new_session=True, **pipe
        ) as done,
    ):
        stop = threading.Timer(limit, os.killpg, (done.pid, signal.SIGKILL))
        stop.start()
        for line in done.stdout or ():
            file.write(line)
            file.flush()
            print(line.decode(errors="replace"), end="", flush=True)
        status = done.wait()
        stop.cancel()
    end = {0: "ok", -signal.SIGKILL: "stopped"}.get(status, f"status {status}")
    print(f"== {name}: {end}, {time.perf_counter() - began:.0f} s", flush=True)
    return status == 0


def main() -> int:
    began = time.perf_counter()
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("steps", nargs="+", help=f"parts A to E, or {', '.join(STEPS)}")
    add("--out", type=Path, required=True, help="folder for texts and JSON")
    add("--budget", type=float, default=570, help="seconds for all (%(default)s)")
    add("--card", choices=CARDS, default="h200", help="whose memory to fill")
    add("--smoke", action="store_true", help="tiny sizes, for a CPU")
    add("--dry_run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    chosen = []
    for word in arguments.steps:
        found = [n for n, step in STEPS.items() if word in (n, step.part)]
        if not found:
            raise UserError(
                f"{word} is no part and no step: A to E, {', '.join(STEPS)}"
            )
        chosen += found
    if not importlib.util.find_spec("torch"):
        missing = [name for name in chosen if name.startswith("peer")]
        chosen = [name for name in chosen if name not in missing]
        if missing:
            print(f"no torch here, left out: {', '.join(missing)}")
    values = SMOKE if arguments.smoke else FULL | CARDS[arguments.card]
    out, failed = arguments.out.absolute(), []
    if not arguments.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        left = arguments.budget - (time.perf_counter() - began)
        words = command(name, values, out, left)
        if arguments.dry_run:
            print(shlex.join(words))
        elif left < LEFT:
            print(f"== {name}: left out, {left:.0f} s left")
            failed.append(name)
        elif not run(name, words, out, min(STEPS[name].limit, left - 5)):
            failed.append(name)
    if failed:
        print(f"failed or left out: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    run_program(main)
