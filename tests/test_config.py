"""Configs say what they mean, and mistakes end in one line."""

import importlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from sra2_jax.optim import make_optimizer
from sra2_jax.state import build_networks, create_sharded
from sra2_jax.workdir import check_dataset, claim_workdir

from configs import default
from sra2_jax import alignment, attention, config_checks, sampler, transport, workdir
from sra2_jax import config as configuration
from sra2_jax.alignment import TeacherAlignment
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, DINOv2Config
from sra2_jax.models.dit import REMAT_POLICIES
from sra2_jax.sharding import make_mesh
from sra2_jax.step import batch_shapes, make_step

ROOT = Path(__file__).parents[1]
FILE = """
from configs import default
def get_config():
    c = default.get_config()
    {}
    return c
"""
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


def test_tables_have_every_key_with_its_type_and_choices():
    flat = dict(configuration.flatten(default.get_config()))
    assert set(config_checks.KEYS) == set(flat)
    for key, value in flat.items():
        assert config_checks.kind(key) is type(value), key
    # Written out there, since these modules import jax.
    for key, choices in {
        "model.remat": tuple(REMAT_POLICIES),
        "model.attention": attention.CHOICES,
        "transport.path": transport.PATHS,
        "transport.prediction": transport.PREDICTIONS,
        "transport.time": transport.TIMES,
        "align.*.schedule": alignment.SCHEDULES,
        "align.*.loss": alignment.LOSSES,
        "align.vae.target": alignment.TARGETS,
        "align.encoder.source": alignment.SOURCES,
        "sampling.method": sampler.SAMPLERS,
    }.items():
        assert config_checks.CHOICES[key] == choices


def test_flags_override_a_copy():
    config = configuration.load(
        "configs/quickstart.py",
        ["--config.steps=1_000", "--config.seed", "7", "--config.model.scan=TRUE",
         "--config.optim.eps=1", "--config.data.dir=", "--config.latents.shift_factor",
         "-.5"],
    )  # fmt: skip
    assert (config.steps, config.seed, config.model.scan) == (1000, 7, True)
    assert (config.optim.eps, config.data.dir) == (1.0, "")
    assert config.latents.shift_factor == -0.5
    changed = configuration.override(config, ["--config.steps=3"])
    assert (changed.steps, config.steps) == (3, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "is no config file (SyntaxError: "),
        ("import nothing_of_this_name", "(ModuleNotFoundError: No module"),
        ("def get_config(): raise SystemExit(3)", "(SystemExit: 3)"),
        ("x = 1", "has no attribute 'get_config')"),
        ("def get_config(): return {}", "its get_config() returns no ConfigDict"),
        (
            FILE.format("c.steps = 'many'"),
            "(TypeError: Could not override field 'steps'",
        ),
        (FILE.format("c.more = 3"), "unknown key config.more"),
        (FILE.format("del c.seed"), "config.seed is missing: see configs/default.py"),
        (FILE.format("del c.optim"), "the config file does not fit ("),
    ],
)
def test_config_files_that_are_none(text, message, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        configuration.check(configuration.load(str(file), ["--config.optim.eps=1"]))
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
    ("text", "message"),
    [
        ("", "cannot be read (not JSON"),
        ('{"steps": 4', "cannot be read (not JSON"),
        ("[" * 100_000, "cannot be read (not JSON"),
        ("9" * 10_000, "cannot be read (not JSON"),
        (" " * 2**21, "more than 1,048,576 bytes"),
        ("\xff", "cannot be read (not JSON"),
        ("[]", "no JSON object"),
        ('{"a": ' * 500 + "1" + "}" * 500, "unknown key config.a.a"),
        ("steps=4.5", "config.steps=4.5: must lie between"),
        ("steps=true", "config.steps=True: must lie between"),
        ("steps=[4]", "config.steps=[4]: must lie between"),
        ("steps={}", "config.steps is missing"),
        ("steps=null", "config.steps=None: must"),
        ("ema_decay=NaN", "config.ema_decay=nan: must"),
        ("ema_decay=1" + "0" * 400, "config.ema_decay=1000"),
        ("model=3", "config.model is a section"),
        ('name="../x"', "config.name='../x': must be a name"),
        ('align={"evil": {"enabled": true}}', "unknown key config.align.evil"),
    ],
)
def test_malformed_saved_configs(text, message, tiny, tmp_path):
    """JSON of many kinds, or "KEY=VALUE" put into a good one."""
    file = epath.Path(tmp_path) / "config.json"
    key, equals, value = text.partition("=")
    if equals:
        saved = tiny.to_dict() | {key: "VALUE"}
        text = json.dumps(saved).replace('"VALUE"', value)
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        configuration.from_saved(configuration.read_json(file), str(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.fixture
def resumable(tiny, tmp_path):
    """A workdir with a checkpoint, as far as its names say."""
    workdir = epath.Path(tmp_path) / "run"
    claim_workdir(tiny, workdir)
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    return workdir


def test_a_resumed_run_says_what_changed(tiny, resumable, capsys):
    claim_workdir(tiny, resumable)
    assert not capsys.readouterr().err
    changes = {
        "steps": 9, "data.dir": "moved", "mesh.fsdp": 2, "accumulate": 2, "name": "new",
        "run.log_every": 2, "eval.every": 4, "sampling.steps": 7, "model.scan": False,
        "align.teacher.depth": 2,  # off
    }  # fmt: skip
    tiny.update_from_flattened_dict(changes)
    claim_workdir(tiny, resumable)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(changes) - 1
    assert "resumed with config.steps: 4 -> 9" in lines
    assert "resumed with config.data.dir: '' -> 'moved'" in lines
    saved = configuration.read_json(resumable / "config.json")
    assert configuration.from_saved(saved, "it").to_dict() == tiny.to_dict()
    assert {p.name for p in resumable.iterdir()} == {
        "config.json", "versions.json", "checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"batch_size": 32},
        {"data.streams": 1},
        {"data.shuffle_buffer": 7},
        {"data.resolution": 64},
        {"label_dropout": 0.2},
        {"latents.scaling_factor": 1.0},
        {"model.width": 32},
        {"transport.path": "gvp"},
        {"align.vae.weight": 0.1},
        {"align.vae.enabled": False},
        {"align.teacher.enabled": True},
        {"optim.learning_rate": 1e-5},
        {"ema_decay": 0.5},
    ],
)
def test_a_resumed_run_refuses_what_makes_it_another(changes, tiny, resumable):
    before = (resumable / "config.json").read_text()
    tiny.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        claim_workdir(tiny, resumable)
    ((key, value),) = changes.items()
    said = str(error.value)
    assert "\n" not in said
    assert f"config.{key}: " in said
    assert f" -> {value!r}" in said
    assert (resumable / "config.json").read_text() == before
    (resumable / "checkpoints" / "2").rmdir()  # nothing was trained
    claim_workdir(tiny, resumable)


def test_a_resumed_run_refuses_another_dataset(tmp_path, resumable):
    """It may move; before a checkpoint, and in runs that say nothing, it may change."""
    folders = [epath.Path(tmp_path) / name for name in "abc"]
    for folder, text in zip(folders, ("one", "one", "two"), strict=True):
        folder.mkdir()
        (folder / "latents.json").write_text(text)
    facts = resumable / "run.json"
    digest = check_dataset(resumable, folders[0])
    facts.write_text('{"latents": {}}')
    assert check_dataset(resumable, folders[2]) != digest
    facts.write_text(json.dumps({"latents": {"sha256": digest}}))
    assert check_dataset(resumable, folders[1]) == digest
    with pytest.raises(UserError, match="is not the dataset that"):
        check_dataset(resumable, folders[2])
    facts.write_text('{"latents"')
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        check_dataset(resumable, folders[0])
    (resumable / "checkpoints" / "2").rmdir()
    assert check_dataset(resumable, folders[2]) != digest


def test_lost_saved_config_is_refused(tiny, resumable):
    for text in ("{", "[]"):
        (resumable / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"holds checkpoints, but .*cannot be read"):
            claim_workdir(tiny, resumable)


def test_small_files_are_written_whole_and_again(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "a.json"
    monkeypatch.setattr(workdir, "TRIES", (0, 0))
    workdir.write_whole(path, "old")
    os.link(path, tmp_path / "as it was")
    left = ["first", "second"]

    def failing(self, text):
        if left:
            raise OSError(left.pop())
        return write(self, text)

    write = type(path).write_text
    monkeypatch.setattr(type(path), "write_text", failing)
    workdir.write_whole(path, "new")
    assert path.read_text() == "new"
    assert (tmp_path / "as it was").read_text() == "old"
    left += ["a", "b", "c"]
    with pytest.raises(OSError, match="a"):
        workdir.write_whole(path, "newer")
    assert path.read_text() == "new"
