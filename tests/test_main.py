"""main.py's command line: every mistake is one line, at once; --help is quick."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax

from sra2_jax import command
from sra2_jax.command import Parser
from sra2_jax.config_file import override
from sra2_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
WHOLE = "a whole number"
MANY = "9" * 5000

# arguments -> what the line says: the key, the value, what is allowed
BAD = {
    # keys and flags
    "--config.stepz=3": "unknown key config.stepz: did you mean config.steps?",
    "--config.optim.learning_rat=1": "did you mean config.optim.learning_rate?",
    "--config.xyzzy=3": "unknown key config.xyzzy: --keys lists them",
    "--config.model=5": "config.model is a section: set its keys, as config.model.",
    "--steps=3": "unknown flag --steps: did you mean --config.steps?",
    "steps=3": "unexpected argument 'steps' (--help",
    "--workdir": "argument --workdir: expected one argument",
    "--workdir=": "--workdir= is empty: name a folder",
    "--process_id=first": "argument --process_id: invalid int value: 'first'",
    "--config=configs/nothing.py": "--config=configs/nothing.py names no file",
    "--config=README.md": "--config=README.md is no config file (SyntaxError: ",
    # types
    "--config.steps=": f"config.steps='': must lie between 1 and 2147483647, {WHOLE}",
    "--config.steps=many": f"config.steps='many': must lie between 1 and 2147483647, {WHOLE}",  # noqa: E501
    f"--config.steps={MANY}": "config.steps='999999",
    "--config.model.scan=1": "config.model.scan='1': must be true or false",
    "--config.optim.eps=tiny": "config.optim.eps='tiny': must lie between 1e-30 and 1",
    "--config.name=../../etc": "config.name='../../etc': must be a name of letters",
    "--config.vae=": "config.vae='': must not be empty",
    # ranges
    "--config.steps=0": "config.steps=0: must lie between 1 and 2147483647",
    "--config.optim.learning_rate=nan": "config.optim.learning_rate=nan: must lie betw",
    "--config.transport.path=cubic": "must be one of 'linear', 'gvp', 'vp'",
    # combinations
    "--config.batch_size=12 --config.accumulate=5": "config.batch_size=12 is not divis",
    "--config.accumulate=7": "=64 is not divisible by config.accumulate=7",
    "--config.mesh.fsdp=3": "batch_size=64 is not divisible by config.mesh.fsdp=3",
    "--config.mesh.data=0": "config.mesh.data=0: must be -1 or at least 1",
    "--config.mesh.tensor=3": "=4 is not divisible by config.mesh.tensor=3",
    "--config.mesh.data=32 --config.mesh.fsdp=4": "config.accumulate = 128",
    "--config.align.vae.depth=7": "the network has config.model.depth=6 blocks",
    "--config.align.teacher.enabled=true --config.align.teacher.teacher_depth=9": (
        "config.align.teacher.teacher_depth=9: the network has config.model.depth=6"
    ),
    "--config.align.vae.t_min=0.5 --config.align.vae.t_max=0.5": "must be below config",
    "--config.sampling.guidance_low=0.8 --config.sampling.guidance_high=0.2": (
        "config.sampling.guidance_low=0.8 must not exceed config.sampling.guidance_high"
    ),
    "--config.sampling.guidance_channels=5": "exceeds config.latents.channels=4",
    "--config.sampling.head_guidance=2 --config.align.vae.zscore=true": (
        "config.sampling.head_guidance=2.0 needs config.align.vae on, zscore off"
    ),
    "--config.model.rope=true --config.model.heads=16": "must be divisible by 4",
    "--config.latents.mean=1,2": "(1.0, 2.0): 4 numbers are wanted, or none",
    "--config.latents.mean=1,2,3,4 --config.latents.std=1,1,1,0": "must be numbers bet",
    "--config.run.profile_steps=9": 'must be "" or FIRST:LAST',
    "--config.model.patch_size=3": "latents.size=8 is not divisible by config.model.",
    "--config.run.log_every=33": "must be a multiple of config.run.log_every=33",
    "--config.run.keep_every=7": "config.run.keep_every=7 must be 0 or a multiple of",
    "--config.data.num_classes=12": "config.eval.features='mnist' needs",
    # what is not there
    "--config.data.dir=/nowhere --config.data.images=": "no latents dataset in /nowh",
    "--config.data.images=/nowhere": "config.data.images=/nowhere: no such folder",
    "--config.vae=/nowhere": "config.vae=/nowhere: no such folder, and no owner/name",
    "--config.eval.features=inception": "needs config.eval.reference",
    "--workdir=runs/[2026]/a --config.data.images=digits": "must have no [, * or ?",
    "--config.eval.features=inception --config.eval.reference=/nowhere.npz "
    "--config.eval.inception=/nowhere": "config.eval.inception=/nowhere: no such file",
}

# Runs main() on each line of arguments, in a process that has imported nothing yet.
ALL = """
import json, sys
sys.modules["jax"] = None  # importing them fails
import main
from sra2_jax.errors import UserError
for line in json.load(sys.stdin):
    sys.argv = ["main.py", *line.split(" ")]
    if "workdir" not in line:
        sys.argv.insert(1, "--workdir=/nowhere/run")
    try:
        main.main()
        print(json.dumps("not refused"))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def python(*arguments, quick=60, **named):
    """The process; it must not compute for longer than `quick` seconds."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **named
    )
    assert os.times().children_user - before.children_user < quick
    return done


def test_mistakes_are_refused_without_jax():
    """In one process, which could not import it."""
    lines = list(BAD)
    done = python("-c", ALL, input=json.dumps(lines), timeout=60)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = {a: b for a, b in zip(lines, said, strict=True) if BAD[a] not in b}
    assert not wrong
    assert not [line for line in said if "\n" in line or len(line) >= 300]


def test_program_refuses_within_three_seconds(tmp_path):
    """With status 2, and nothing made."""
    line = "--config.optim.learning_rate=nan"
    done = python("main.py", line, f"--workdir={tmp_path / 'run'}", quick=3)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert BAD[line] in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_mesh_is_refused_before_the_workdir(start, tmp_path):
    """The number of devices is known to jax alone."""
    run = start("--config.mesh.fsdp=16", f"--workdir={tmp_path}/run", devices=8)
    assert run.status() == 2
    assert "config.mesh.fsdp=16 x config.mesh.tensor=1 must be the num" in run.text
    assert len(run.text.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_jax_as_the_environment_has_it():
    """What numbers rest on is pinned; what cannot work is said in one line."""
    script = (
        "import jax; from sra2_jax.sharding import make_mesh\n"
        "for name in ('cuda', 'cpu'):\n"
        "    try: make_mesh()\n"
        "    except ValueError as error: print(error)\n"
        "    jax.config.update('jax_platforms', name)\n"
        "print(jax.random.bits(jax.random.key(0), (3,)), jax.numpy.ones(1).dtype)\n"
    )
    odd = {
        "JAX_PLATFORMS": "rocm",
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
    }
    *both, drawn = python("-c", script, env=os.environ | odd).stdout.splitlines()
    assert len(both) == 2
    for said in both:
        assert re.fullmatch(r"JAX finds no device \(.*\): see JAX_PLATFORMS.*", said)
    make_mesh()
    here = jax.random.bits(jax.random.key(0), (3,)), jax.numpy.ones(1).dtype
    assert drawn == "{} {}".format(*here)
    done = python("-OO", "main.py", "--workdir=/nowhere/run")
    assert done.returncode == 2
    match = "error: Python leaves out texts .* without -OO\n"
    assert re.fullmatch(match, done.stderr), done.stderr


def test_home_is_found_behind_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--out")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_keys()
    line = ["--out=~/a=b", "--config.data.dir=~/c", "~/d", "e~"]
    found = parser.parse_args(line)
    assert found.out == f"{tmp_path}/a=b"
    assert found.overrides == {"data.dir": f"{tmp_path}/c"}
    assert found.files == [tmp_path / "d", Path("e~")]
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'data': {'dir': '~/c'}})\n"
    )
    assert override(str(config), {}).data.dir == f"{tmp_path}/c"


def test_help_and_keys():
    done = python("main.py", "--help", quick=2)
    assert done.returncode == 0
    for flag in ("--workdir", "--config", "--keys", "--distributed", "--config.KEY="):
        assert flag in done.stdout
    done = python("main.py", "--keys", "--config.steps=7")
    for line in (
        "--config.steps=7  optimizer steps of the whole run (must lie between 1 and",
        "--config.align.teacher.loss=smooth_l1  between prediction and target (must",
    ):
        assert line in done.stdout


def test_nobody_listens():
    """As `| head` that has seen enough: neither a traceback nor success."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "main.py", "--keys"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_flags_of_xla(monkeypatch):
    """XLA knows them (it aborts otherwise), and the user's own come last."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    command.set_xla_flags()
    words = os.environ["XLA_FLAGS"].split()
    assert words == [*command.GPU_FLAGS, "--xla_gpu_autotune_level=0"]
    assert os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION") == "0.92"
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n"
