"""Eight simulated CPU devices for every test; types checked at public functions."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time here; a quarter of that without LLVM's optimisations
# and with XLA's older code for fusions, where it is still there, in one piece; and a
# little less by what XLA itself holds for fast.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
    )

import fcntl
import gc
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import install_import_hook
from ml_collections import ConfigDict

# The tests of the whole job compile the same programs again and again. The first
# process makes the folder; its worker processes inherit the variable.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHE.name}/compiled"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Tracing makes many objects and little garbage; the young are looked through rarely,
# all of them after each file of tests.
gc.set_threshold(200_000, 20, 1_000_000)

ROOT = Path(__file__).parents[1]
# Digits and compiled figures are recorded with the pinned version.
pinned = pytest.mark.skipif(
    f"jax=={version('jax')}\n" not in (ROOT / "requirements.txt").read_text(),
    reason="recorded with the jax of requirements.txt",
)
sys.path.insert(0, str(ROOT))

# Shapes and types named in annotations are checked here and cost nothing elsewhere.
TYPED = ("models", "transport", "alignment", "sampler", "generator")
install_import_hook([f"sra2_jax.{name}" for name in TYPED], "beartype.beartype")


# Those that take longest come first, and not two that wait for the same fixture.
FIRST = [
    "text", "bucket", "verify", "distributed", "stopped", "step", "methods", "train",
    "convert", "vae",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)


@contextmanager
def one_line(*words: str, match: str | None = None) -> Iterator[Any]:
    """A UserError of one line, with these words and what fits a pattern."""
    from sra2_jax.errors import UserError

    with pytest.raises(UserError, match=match) as error:
        yield error
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "diffusers")


@pytest.fixture
def heavy() -> None:
    """For a test that may import these."""


@pytest.fixture(autouse=True)
def slim(request: pytest.FixtureRequest) -> Iterator[None]:
    """No other can: nothing needs them but what they are the point of."""
    if "heavy" in request.fixturenames:
        yield
        return
    loaded = {name: sys.modules.pop(name) for name in HEAVY if name in sys.modules}
    sys.modules.update(dict.fromkeys(HEAVY))  # type: ignore[arg-type]
    yield
    for name in HEAVY:
        del sys.modules[name]
    sys.modules.update(loaded)


@pytest.fixture
def golden() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture
def tiny() -> ConfigDict:
    """The digits with a network of 2 blocks and width 16, and 8 rows a step."""
    from configs import digits

    c = digits.get_config()
    c.name = "tiny"
    c.steps = 4
    c.batch_size = 16
    c.model.width, c.model.depth, c.model.heads = 16, 2, 2
    c.model.scan = True
    c.align.vae.head_layers = 2
    for section in c.align.values():
        section.depth = 1
    c.align.teacher.teacher_depth = 2
    c.sampling.steps = 3
    c.run.log_every = 1
    c.run.checkpoint_every = 2
    c.run.grid_columns = 1
    c.eval.every = 2
    c.eval.num_samples = 80
    return c


def write_config(folder: Path, config: ConfigDict) -> Path:
    """Write a config to a file for --config."""
    file, text = folder / "config.py", json.dumps(config.to_dict())
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads({text!r}))\n"
    )
    return file


@pytest.fixture
def as_file(tmp_path: Path) -> Callable[[ConfigDict], Path]:
    return partial(write_config, tmp_path)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training makes neither pictures nor a report: half the time."""
    from tests.faults.driver import Blind

    monkeypatch.setattr("sra2_jax.train.Observer", Blind)


@pytest.fixture
def litter() -> Iterator[None]:
    """Orbax leaves coroutines and event loops behind when a restore fails."""
    yield
    gc.collect()  # here, where their warnings are expected


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    """16 records of made-up latents for `tiny`."""
    draw = np.random.default_rng(0)
    return {
        "mean": draw.normal(size=(16, 4, 4, 4)).astype(np.float16),
        "std": draw.uniform(0.1, 0.3, size=(16, 4, 4, 4)).astype(np.float16),
        "label": (np.arange(16) % 10).astype(np.int32),
        "image": draw.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
    }


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """A path below a folder of all worker processes, that the first of them makes."""
    path = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".made").open("a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        if not made.seek(0, os.SEEK_END):
            make(path)
            made.write("whole")
    return path


@pytest.fixture(scope="session")
def latents() -> Path:
    """The training digits, encoded once, with images and features beside them."""
    from sra2_jax.data.encode import EncodeOptions, encode

    names = dict.fromkeys(("images", "vae", "encoder"), "digits")
    options = {"resolution": 32, "store_images": True, "grid": 4, **names}
    return shared("latents", lambda path: encode(EncodeOptions(str(path), **options)))


@pytest.fixture(scope="session")
def finished(latents: Path) -> tuple[Any, Path]:
    """(config, workdir) of a run of 4 steps that nothing interrupted; not to change."""
    from sra2_jax.config import Config
    from sra2_jax.train import train

    config = Config.of(tiny.__wrapped__()).override({"data.dir": str(latents)})
    return config, shared("finished", lambda path: train(config, str(path)))


class Process:
    """A run; `text` is what it has printed."""

    def __init__(self, pid, out, ended):
        self.pid, self._out, self._ended = pid, out, ended

    @property
    def text(self):
        return self._out.read_text(errors="replace") if self._out.exists() else ""

    def until(self, condition, seconds=200):
        """Wait until `condition`, a text it prints or a function, is there."""
        there = condition if callable(condition) else lambda: condition in self.text
        end = time.monotonic() + seconds
        while not there():
            assert self.pid not in self._ended, f"ended early:\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"waited for {condition}:\n{self.text}"
            time.sleep(0.01)
        return self

    def kill(self, number=signal.SIGTERM):
        os.kill(self.pid, number)
        return self

    def status(self, seconds=200):
        """Wait for its end, at most so long; its exit status."""
        end = time.monotonic() + seconds
        while self.pid not in self._ended:
            assert time.monotonic() < end, f"still runs:\n{self.text[-3000:]}"
            time.sleep(0.01)
        return self._ended[self.pid]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """start(*words, devices=1, **faults) -> Process: arguments of main.py, or a program
    and its; see faults/driver.py."""
    folder = tmp_path_factory.mktemp("out")
    driver = subprocess.Popen(
        [sys.executable, "tests/faults/driver.py"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    started, ended, pids = queue.Queue(), {}, []

    def listen():
        for line in driver.stdout:
            what, pid, *status = line.split()
            if what == "started":
                started.put(int(pid))
            else:
                ended[int(pid)] = int(status[0])

    threading.Thread(target=listen, daemon=True).start()
    count = iter(range(1000))

    def start(*arguments, devices=1, environment=None, **faults):
        out = folder / f"{next(count)}.txt"
        flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
        faults["environment"] = {"XLA_FLAGS": flags} | (environment or {})
        command = {"arguments": list(map(str, arguments)), "out": str(out)}
        driver.stdin.write(json.dumps(command | {"faults": faults}) + "\n")
        driver.stdin.flush()
        pids.append(started.get(timeout=200))
        return Process(pids[-1], out, ended)

    yield start
    for pid in set(pids) - ended.keys():  # of tests that failed
        os.kill(pid, signal.SIGKILL)
    driver.kill()
    driver.wait()
    driver.stdin.close()
    driver.stdout.close()
