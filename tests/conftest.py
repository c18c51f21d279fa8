"""Eight simulated CPU devices for every test; types checked at public functions."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time here; a quarter of that without LLVM's optimisations
# and with XLA's older code for fusions, where it is still there.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
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
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

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
    """The quickstart with a network of 2 blocks and width 16, and 8 rows a step."""
    from configs import quickstart

    c = quickstart.get_config()
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


@pytest.fixture
def as_file(tmp_path: Path) -> Callable[[ConfigDict], Path]:
    """Writes a config to a file for --config."""

    def write(config: ConfigDict) -> Path:
        file, text = tmp_path / "config.py", json.dumps(config.to_dict())
        file.write_text(
            "import json\nfrom ml_collections import ConfigDict\n"
            f"def get_config(): return ConfigDict(json.loads({text!r}))\n"
        )
        return file

    return write


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


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training digits, encoded once, with images and features beside them."""
    from sra2_jax.data.encode import EncodeOptions, encode

    folder = tmp_path_factory.mktemp("data") / "latents"
    names = dict.fromkeys(("images", "vae", "encoder"), "digits")
    encode(
        EncodeOptions(str(folder), resolution=32, store_images=True, grid=4, **names)
    )
    return folder


@pytest.fixture(scope="session")
def finished(
    latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """(config, workdir) of a run of 4 steps that nothing interrupted; not to change."""
    from sra2_jax.config import Config
    from sra2_jax.train import train

    config = Config.of(tiny.__wrapped__()).override({"data.dir": str(latents)})
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(config, str(workdir))
    return config, workdir
