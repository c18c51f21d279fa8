"""Configs say what they mean, and mistakes end in one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from sra2_jax import config as configuration
from sra2_jax.alignment import TeacherAlignment
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.training.optim import make_optimizer
from sra2_jax.training.sharding import make_mesh
from sra2_jax.training.state import build_networks, create_sharded
from sra2_jax.training.step import batch_shapes, make_step

ROOT = Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# config -> the sections of config.align that it switches on
METHODS = {name: {"vae"} for name in NAMES} | {
    "sit_xl": set(),
    "repa_b": {"encoder"}, "repa_xl": {"encoder"},
    "sra_b": {"teacher"}, "sra_xl": {"teacher"},
    "repa_sra2_b": {"encoder", "vae"}, "repa_sra2_xl": {"encoder", "vae"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    configuration.check(config)
    network, heads = build_networks(config)
    assert network.depth == config.model.depth
    on = {k for k, section in config.align.items() if section.enabled}
    assert set(heads) == on == METHODS[name]

    # The whole step at its real size, as shapes only.
    transform, schedule = make_optimizer(**config.optim)
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size)
    abstract, _ = create_sharded(config, transform, mesh)
    encoder = DINOv2(DINOv2Config())
    step = make_step(config, transform, schedule, mesh, abstract, encoder)
    pixels = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
    batch = batch_shapes(config, mesh)
    assert ("image" in batch) == ("encoder" in on)
    after, metrics = jax.eval_shape(step, abstract, batch, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("name", "size", "depth", "steps"),
    [
        ("sra2_s", "S", 2, 400_000),
        ("sra2_b", "B", 2, 400_000),
        ("sra2_l", "L", 8, 400_000),
        ("sra2_xl", "XL", 8, 4_000_000),
        ("sra2_xl_512", "XL", 8, 4_000_000),
        ("sit_xl", "XL", None, 7_000_000),
    ],
)
def test_paper_settings(name, size, depth, steps):
    """The paper's table as method.md gives it."""
    c = importlib.import_module(f"configs.{name}").get_config()
    assert (c.model.width, c.model.depth, c.model.heads) == default.SIZES[size]
    assert c.steps == steps
    assert (c.align.vae.depth if c.align.vae.enabled else None) == depth
    assert (c.align.vae.weight, c.align.vae.beta, c.align.vae.loss) == (
        1.0, 0.05, "smooth_l1",
    )  # fmt: skip
    o = c.optim
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (
        1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0,
    )  # fmt: skip
    assert (c.batch_size, c.ema_decay, c.label_dropout) == (256, 0.9999, 0.1)
    assert (c.sampling.method, c.sampling.steps) == ("euler_maruyama", 250)
    assert c.latents.size * 8 == c.data.resolution == (512 if "512" in name else 256)


def test_settings_of_repa_and_sra():
    """method.md's table; the protocol's schedule in epochs of 5,004 steps."""
    whole, same = default.get_config(), default.get_config()
    default.set_size(same, "XL")
    assert whole.to_dict() == same.to_dict()
    c = whole.align
    e, t = c.encoder, c.teacher
    assert (e.depth, e.weight, e.loss, e.head_layers, e.head_width) == (
        8, 0.5, "cosine", 3, 2048,
    )  # fmt: skip
    assert (t.depth, t.teacher_depth, t.interval, t.weight, t.loss, t.beta) == (
        8, 20, 0.2, 0.2, "smooth_l1", 0.05,
    )  # fmt: skip
    spec = TeacherAlignment(**{k: v for k, v in t.to_dict().items() if k != "enabled"})
    for epoch in (0, 149, 300, 800):
        expected = 0.2 * 10 ** (-max(epoch - 149, 0) / 1000)
        weight = spec.weight_at(jnp.asarray(epoch * 5004))
        assert float(weight) == pytest.approx(expected, rel=1e-5)
    assert (t.head_layers, t.head_width) == (2, 0)


PATHS = (
    "name", "vae", "data.dir", "data.images", "align.encoder.model",
    "eval.inception", "eval.reference",
)  # fmt: skip


def test_every_number_has_a_range_and_every_choice_a_list():
    for key, value in configuration.flatten(default.get_config()):
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            assert configuration.rule(configuration.RANGES, key), key
        elif key not in PATHS:
            assert configuration.rule(configuration.CHOICES, key), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -5}, "config.steps=-5: must lie between 1"),
        ({"optim.learning_rate": float("nan")}, "config.optim.learning_rate=nan"),
        ({"ema_decay": 1.5}, "config.ema_decay=1.5"),
        ({"transport.path": "cubic"}, "'linear', 'gvp', 'vp'"),
        ({"model.dtype": "float16"}, "config.model.dtype='float16'"),
        ({"align.vae.depth": 7}, "the network has config.model.depth=6 blocks"),
        ({"model.patch_size": 3}, "does not divide config.latents.size=4"),
        ({"model.heads": 7}, "must be divisible by 4 and by config.model.heads=7"),
        ({"model.attention": "cudnn"}, "needs config.model.dtype='bfloat16'"),
        ({"align.vae.t_min": 0.9, "align.vae.t_max": 0.1}, "must be below"),
        ({"align.vae.loss": "huber"}, "config.align.vae.loss='huber'"),
        (
            {"align.teacher.enabled": True, "align.teacher.teacher_depth": 7},
            "config.align.teacher.teacher_depth=7: the network has",
        ),
        ({"align.encoder.weight": -1.0}, "config.align.encoder.weight=-1.0"),
        ({"accumulate": 3}, "not divisible by config.accumulate=3"),
        ({"data.streams": 7}, "not divisible by config.data.streams=7"),
        ({"run.checkpoint_every": 33}, "multiple of config.run.log_every"),
        ({"mesh.data": 0}, "config.mesh.data=0"),
        ({"sampling.guidance_channels": 5}, "exceeds config.latents.channels=4"),
        ({"data.num_classes": 12}, "config.eval.features='digits' needs"),
    ],
)
def test_impossible_values(changes, message):
    config = importlib.import_module("configs.quickstart").get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        configuration.check(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 1, 16), "must be the number of devices, 8"),
        ((-1, 3, 16), "must be the number of devices, 8"),
        ((-1, 1, 12), "config.batch_size=12 is not divisible by 8 devices"),
        ((-1, 2, 16, 4), "x config.accumulate=4"),
    ],
)
def test_mesh_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*arguments)
    assert make_mesh(-1, 2, 16).shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.optim.learning_rat=1",
            "error: unknown key config.optim.learning_rat: "
            "did you mean config.optim.learning_rate?",
        ),
        ("--config.steps=many", "error: flag --config.steps=many"),
        (
            "--config=configs/nothing.py",
            "error: --config=configs/nothing.py names no file: see configs/",
        ),
        ("--workdirr=x", "error: Unknown command line flag 'workdirr'"),
        ("--config.batch_size=0", "error: config.batch_size=0: must lie between 1"),
    ],
)
def test_main_refuses_in_one_line(flag, message, tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={tmp_path}/run", flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
