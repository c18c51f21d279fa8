"""Configs say what they mean, and mistakes end in one line."""

import importlib
import json
import os

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from sra2_jax import command, config_file, storage
from sra2_jax.alignment import ALIGNMENTS
from sra2_jax.config import Config
from sra2_jax.config_align import Align
from sra2_jax.errors import UserError
from sra2_jax.fingerprint import kinds
from sra2_jax.run import Run
from sra2_jax.section import fields, fits
from sra2_jax.sharding import make_mesh, mesh
from sra2_jax.step import Program
from tests.conftest import ROOT, one_line

FILE = """
from sra2_jax.config_file import default
def get_config():
    c = default()
    {}
    return c
"""
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# of each method and block one -> the sections of config.align that it switches on
STEPS = {
    "ig_b": {"vae"},
    "irepa_b": {"irepa"},
    "lightning_b": set(),
    "repa_mmdit_coco": {"encoder"},
    "repa_sra2_b": {"encoder", "vae"},
    "sra_b": {"teacher"},
}


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_valid(name):
    """State and batch of each at its real size, some whole steps, as shapes only."""
    program = Program(config_file.load(name), make_mesh())
    on = {n for n, s in vars(program.config.align).items() if s.enabled}
    assert program.abstract.params["heads"].keys() == STEPS.get(name, on)
    image = {"image"} if on & {"encoder", "irepa"} else set()
    condition = "captions" if program.reader else "label"
    assert program.batch.keys() == {"mean", "std", condition} | image
    if name in STEPS:
        inputs = program.abstract, program.batch, program.frozen
        after, metrics = jax.eval_shape(program.update, *inputs)
        assert kinds(after) == kinds(program.abstract)
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
    c = config_file.load(name)
    vae, o, sizes = c.align.vae, c.optim, (c.model.width, c.model.depth, c.model.heads)
    assert (sizes, c.steps) == (config_file.SIZES[size], steps)
    assert (vae.depth if vae.enabled else None) == depth
    assert (vae.weight, vae.beta, vae.loss) == (1.0, 0.05, "smooth_l1")
    assert (o.learning_rate, o.b1, o.b2, o.eps) == (1e-4, 0.9, 0.999, 1e-8)
    assert (o.weight_decay, o.clip_norm) == (0.0, 1.0)
    assert (c.batch_size, c.ema_decay, c.label_dropout) == (256, 0.9999, 0.1)
    assert (c.sampling.method, c.sampling.steps) == ("euler_maruyama", 250)
    assert c.latents.size * 8 == c.data.resolution == (512 if "512" in name else 256)


def test_settings_of_repa_and_sra():
    """method.md's table; the protocol's schedule in epochs of 5,004 steps."""
    same = importlib.import_module("configs.default").get_config()
    config_file.set_size(same, "XL")
    assert Config.of(same) == Config()
    e, t = Config().align.encoder, Config().align.teacher
    assert (e.depth, e.weight, e.loss) == (8, 0.5, "cosine")
    assert (e.head_layers, e.head_width) == (3, 2048)
    assert (t.depth, t.teacher_depth, t.interval, t.weight) == (8, 20, 0.2, 0.2)
    assert (t.loss, t.beta) == ("smooth_l1", 0.05)
    spec = ALIGNMENTS["teacher"](**vars(t))
    for epoch in (0, 149, 300, 800):
        expected = 0.2 * 10 ** (-max(epoch - 149, 0) / 1000)
        weight = spec.weight_at(jnp.asarray(epoch * 5004))
        assert float(weight) == pytest.approx(expected, rel=1e-5)
    assert (t.head_layers, t.head_width) == (2, 0)


def test_every_key_says_what_it_is():
    """Each has a meaning, and a default that its section takes; each alignment a
    class."""
    for name, f in fields(Config).items():
        assert f.metadata["key"].about, name
        assert fits(f, f.default), name
    assert {*ALIGNMENTS} == {*vars(Align())}


def test_overrides_make_a_copy():
    texts = ["steps=1_000", "model.scan=TRUE", "optim.eps=1", "data.dir=", "seed=7"]
    config = config_file.load("configs/digits.py", *texts)
    assert (config.steps, config.seed, config.model.scan) == (1000, 7, True)
    assert (config.optim.eps, config.data.dir) == (1.0, "")
    assert type(config.optim.eps) is float
    numbers = {"latents.mean": "1,-.5,2,3", "latents.std": "(1, 2, 1, 1)"}
    by_channel = config.override(numbers)
    assert by_channel.latents.mean == (1.0, -0.5, 2.0, 3.0)
    assert Config.of(json.loads(json.dumps(by_channel.to_dict()))) == by_channel
    changed = config.override({"steps": 3, "latents.shift_factor": -1})
    assert (changed.steps, config.steps) == (3, 1000)
    assert changed.latents.shift_factor == -1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "is no config file (SyntaxError: "),
        ("def get_config(): raise SystemExit(3)", "(SystemExit: 3)"),
        ("x = 1", "(KeyError: 'get_config')"),
        ("def get_config(): return {}", "its get_config() returns no ConfigDict"),
        (FILE.format("c.steps = 'many'"), "(TypeError: Could not override field"),
        (FILE.format("c.more = 3"), "unknown key config.more"),
        (FILE.format("del c.optim; c.optim = 3"), "config.optim is a section"),
    ],
)
def test_config_files_that_are_none(text, message, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(text)
    with one_line(message):
        config_file.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3, "batch_size": 48}, "must be the number of devices, 8"),
        ({"batch_size": 12}, "config.batch_size=12 is not divisible by 8 devices"),
        ({"mesh.fsdp": 2, "accumulate": 4}, "x config.accumulate=4"),
    ],
)
def test_mesh_refuses(tiny, changes, message):
    config = Config.of(tiny).override({"batch_size": 24} | changes)
    with pytest.raises(UserError, match=message):
        mesh(config)
    assert make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read (JSONDecodeError"),
        ("[" * 100_000, "cannot be read (RecursionError"),
        ("\xff", "cannot be read (UnicodeDecodeError"),
        ("[]", "no JSON object"),
        ('{"a": ' * 500 + "1" + "}" * 500, "unknown key config.a.a"),
        ("steps=4.5", "config.steps=4.5: must lie between"),
        ("steps=true", "config.steps=True: must lie between"),
        ("steps={}", "config.steps={}: must lie between"),
        ("ema_decay=NaN", "config.ema_decay=nan: must"),
        ("ema_decay=1" + "0" * 400, "config.ema_decay=inf"),
        ("model=3", "config.model is a section"),
        ('name="../x"', "config.name='../x': must be a name"),
        ('align={"evil": {"enabled": true}}', "unknown key config.align.evil"),
    ],
)
def test_malformed_saved_configs(text, message, tiny, tmp_path):
    """JSON of many kinds, or "KEY=VALUE" put into a good one."""
    key, equals, value = text.partition("=")
    if equals:
        saved = tiny.to_dict() | {key: "VALUE"}
        text = json.dumps(saved).replace('"VALUE"', value)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with one_line(message, str(tmp_path / "config.json")) as error:
        Run(tmp_path).config()
    assert len(str(error.value)) < 500


@pytest.fixture
def resumable(tiny, tmp_path):
    """A run with a checkpoint, as far as its names say."""
    resumable = Run(tmp_path / "run")
    resumable.claim(Config.of(tiny), {})
    (resumable.checkpoints / "2").mkdir(parents=True)
    return resumable


def test_a_resumed_run_says_what_changed(tiny, resumable, capsys):
    """Keys that its config.json does not have yet are at their defaults."""
    config = Config.of(tiny)
    path = resumable.folder / "config.json"
    saved = json.loads(path.read_text())
    del saved["run"]["most_skipped"]
    path.write_text(json.dumps(saved))
    resumable.claim(config, {})
    assert not capsys.readouterr().err
    changes = {
        "steps": 9, "data.dir": "moved", "mesh.fsdp": 2, "accumulate": 2, "name": "new",
        "run.log_every": 2, "eval.every": 4, "sampling.steps": 7, "model.scan": False,
        "align.teacher.depth": 2,  # off
    }  # fmt: skip
    config = config.override(changes)
    resumable.claim(config, {})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(changes) - 1
    assert "resumed with config.steps: 4 -> 9" in lines
    assert "resumed with config.data.dir: '' -> 'moved'" in lines
    assert resumable.config() == config
    assert {p.name for p in resumable.folder.iterdir()} == {
        "config.json", "versions.json", "checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"batch_size": 32},
        {"data.resolution": 64, "eval.features": ""},
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
    before = (resumable.folder / "config.json").read_text()
    config = Config.of(tiny).override(changes)
    key, value = next(iter(changes.items()))
    with one_line(f"config.{key}: ", f" -> {value!r}"):
        resumable.claim(config, {})
    assert (resumable.folder / "config.json").read_text() == before
    (resumable.checkpoints / "2").rmdir()  # nothing was trained
    resumable.claim(config, {})


def test_a_resumed_run_refuses_another_dataset_and_a_lost_config(resumable, tiny):
    """A dataset may move; before a checkpoint, and in runs that say nothing, it may
    change."""
    resumable.claim_dataset("a", "one")
    resumable.write("run", {"latents": {"sha256": "one"}})
    resumable.claim_dataset("b", "one")
    with pytest.raises(UserError, match="is not the dataset that"):
        resumable.claim_dataset("c", "two")
    for text in ("{", "[]"):
        (resumable.folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"holds checkpoints, but .*cannot be read"):
            resumable.claim(Config.of(tiny), {})
    (resumable.checkpoints / "2").rmdir()
    resumable.claim_dataset("c", "two")


def test_small_files_are_written_whole_and_again(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "a.json"
    monkeypatch.setattr(storage, "TRIES", (0, 0))
    storage.write_whole(path, "old")
    os.link(path, tmp_path / "as it was")
    left = ["first", "second"]

    def failing(self, target):
        if left:
            raise OSError(left.pop())
        return replace(self, target)

    replace = type(path).replace
    monkeypatch.setattr(type(path), "replace", failing)
    storage.write_whole(path, "new")
    assert path.read_text() == "new"
    assert (tmp_path / "as it was").read_text() == "old"
    left += ["a", "b", "c"]
    with pytest.raises(OSError, match="a"):
        storage.write_whole(path, "newer")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_paths_that_people_give(monkeypatch):
    assert storage.expand("~/a") == os.path.expanduser("~/a")
    assert storage.expand("gs://bucket/a") == "gs://bucket/a"
    assert storage.expand("tfds:imagenet2012") == "tfds:imagenet2012"
    with pytest.raises(UserError, match="s3://a/b: a local path or gs://"):
        command.Parser().parse_args(["--workdir=s3://a/b"])
    monkeypatch.setattr(storage, "CLIENTS", ("no_such_module.storage", "json"))
    with pytest.raises(UserError, match=r"pip install -e '\.\[gcs\]'"):
        config_file.override("quickstart", {"data.dir": "gs://bucket/a"})
