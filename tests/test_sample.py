"""The programs that sample, on a finished tiny run: resume, record, refuse, sweep."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sra2_jax.generator import NOISE, make_sampler, open_run
from sra2_jax.metrics.sets import open_images
from sra2_jax.models import apply
from sra2_jax.programs import evaluate, sample, sweep
from tests.conftest import one_line
from tests.test_step import moved_parameters, program_of

DIGITS = ("--features=digits", "--reference=digits", "--split=test")


@pytest.fixture(scope="module")
def program():
    """Call a program's main with arguments."""

    def call(module, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
            return module.main()

    return call


@pytest.fixture(scope="module")
def whole(finished, program, tmp_path_factory):
    """80 samples of the run, as many as its own scores took."""
    out = tmp_path_factory.mktemp("samples") / "whole.npz"
    program(sample, finished[1], f"--out={out}", "--num=80")
    return out


@pytest.fixture(scope="module")
def results(whole, program):
    """What they score."""
    program(evaluate, whole, *DIGITS)
    return json.loads(whole.with_suffix(".json").read_text())


def test_the_file_says_what_made_it(finished, whole):
    workdir = finished[1]
    with np.load(whole) as file:
        assert file["arr_0"].shape == (80, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_1"], np.arange(80) % 10)
        settings = json.loads(str(file["settings"]))
    expected = {
        "run": str(workdir), "step": 4, "weights": "ema", "seed": 0, "vae": "digits",
        "method": "euler_maruyama", "steps": 3, "guidance": 1.0, "guidance_low": 0.0,
        "guidance_high": 1.0, "labels": "balanced", "rounding": "truncate",
        "count": 80,
    }  # fmt: skip
    assert expected.items() <= settings.items()
    assert settings["versions"]["jax"]
    assert not whole.with_suffix(".shards").exists()


def test_a_killed_program_goes_on_and_gives_the_same_images(
    finished, whole, program, tmp_path, monkeypatch
):
    """Only what is missing is made again; a part cut off in the middle counts as
    missing, and a damaged one is found at the end."""
    monkeypatch.setattr(sample, "IMAGES", 16)
    out = tmp_path / "samples.npz"
    call = finished[1], f"--out={out}", "--num=48", "--config.sampling.batch_size=16"
    write, made, last = sample.Parts.write, [], 1

    def counted(self, number, images):
        if number > last:
            (self.folder / "000002.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(number)
        write(self, number, images)

    monkeypatch.setattr(sample.Parts, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        program(sample, *call)
    assert made == [0, 1]
    assert not out.exists()
    second = out.with_suffix(".shards") / "000001.npy"
    second.write_bytes(second.read_bytes()[:-7])

    last = 9
    with one_line("000001.npy: was damaged and is removed"):
        program(sample, *call)
    assert made == [0, 1, 2]
    with one_line("seed is 0 there, 7 now"):
        program(sample, *call, "--config.seed=7")
    program(sample, *call)
    assert made == [0, 1, 2, 1]
    with np.load(out) as ours, np.load(whole) as expected:
        # the other batch size is compiled to other sums
        difference = ours["arr_0"].astype(int) - expected["arr_0"][:48]
        assert np.abs(difference).max() <= 1
        np.testing.assert_array_equal(ours["arr_1"], expected["arr_1"][:48])


def test_raw_weights_and_what_is_no_number(finished, whole):
    config, workdir = finished
    generate = open_run(str(workdir), config, "raw")
    (images,) = generate(np.arange(16), np.arange(16) % 10)
    with np.load(whole) as file:
        assert np.abs(images - file["arr_0"][:16].astype(int)).max() > 5
    broken = jax.tree.map(lambda p: p * np.nan, generate.vae_params)
    with one_line("samples are not finite numbers"):
        next(replace(generate, vae_params=broken)(np.arange(2), np.arange(2)))


@pytest.mark.parametrize("target", ["sample", "velocity"])
def test_guided_by_the_head(tiny, target):
    """Two steps of Euler against the formula; the first is outside the interval. On the
    linear path a clean latent x means the velocity (x_t - x) / t."""
    tiny.sampling.update(method="euler", steps=2, head_guidance=1.6)
    tiny.sampling.head_guidance_high, tiny.align.vae.target = 0.7, target
    program = program_of(tiny)
    params, labels = moved_parameters(program), jnp.arange(8)
    found = make_sampler(program)(params, labels, labels)

    @jax.jit
    def predicted(x, t):
        inputs = x, jnp.full(8, t), labels
        v, kept, c = apply(program.network, params["network"], *inputs, (1,))
        early = apply(program.heads["vae"], params["heads"]["vae"], kept[1], c)
        early = early.reshape(x.shape)  # patches are of one number
        return v, early if target == "velocity" else (x - early) / t

    key = jax.random.fold_in(jax.random.key(tiny.seed), NOISE)
    keys = (jax.random.fold_in(jax.random.fold_in(key, i), 2) for i in range(8))
    x = jnp.stack([jax.random.normal(k, (4, 4, 4)) for k in keys])
    x = x - 0.5 * predicted(x, 1.0)[0]
    v, early = predicted(x, 0.5)
    expected = x - 0.5 * (early + 1.6 * (v - early))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(found - (x - 0.5 * v)).max() > 0.1


def test_samples_are_of_their_own_dtype(tiny):
    """Whatever the network was trained in."""
    found, indices = {}, np.arange(8)
    params = moved_parameters(program_of(tiny))
    whole, half = "float32", "bfloat16"
    for model, own in ((whole, whole), (half, whole), (whole, half)):
        tiny.model.dtype, tiny.sampling.dtype = model, own
        sampler = make_sampler(program_of(tiny))
        found[model, own] = sampler(params, indices, indices)
    np.testing.assert_array_equal(found[whole, whole], found[half, whole])
    error = np.abs(found[whole, half] - found[whole, whole]).max()
    assert 1e-4 < error < 0.1 * np.abs(found[whole, whole]).max()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=a.npy"], "a.npy: must end in .npz"),
        (["--out={whole}"], "exists already: remove it or use another"),
        (["--out={whole}/x.npz"], "x.npz: "),
        (["--num=0"], "--num=0: must be at least 1"),
        (["--nun=3"], "did you mean --num?"),
        (["--config.model.width=32"], "config.model.width is part of the run"),
        (["--config.sampling.method=rk4"], "config.sampling.method='rk4': must be"),
        (["--step=3"], "no checkpoint of step 3: "),
        (["--config.vae=/nowhere"], "/nowhere"),
    ],
)
def test_refusals(finished, whole, program, tmp_path, flags, message):
    flags = [flag.format(whole=whole) for flag in flags]
    if not flags[0].startswith("--out"):
        flags.append(f"--out={tmp_path / 'x.npz'}")
    with one_line(message):
        program(sample, finished[1], *flags)
    assert not list(tmp_path.iterdir())


def test_evaluate_gives_the_scores_of_the_run(finished, results):
    """Sampled and scored by hand or at the end of training: the same numbers."""
    own = json.loads((finished[1] / "results.json").read_text())["metrics"]
    assert results["metrics"]["accuracy"] == pytest.approx(own["accuracy"], abs=0.02)
    assert results["metrics"]["frechet"] == pytest.approx(own["frechet"], rel=1e-3)
    assert 0 <= results["metrics"]["precision"] <= 1
    assert results["sampling"]["steps"] == 3
    assert results["num_samples"] == 80
    assert results["notes"] == []


def test_a_reference_file_equals_the_images_it_was_made_of(
    whole, results, program, tmp_path, capsys
):
    """Statistics and images inside; another network's are refused."""
    made, out = tmp_path / "reference.npz", tmp_path / "out.json"
    program(evaluate, "digits", "--split=test", "--features=digits",
            f"--make_reference={made}")  # fmt: skip
    with np.load(made) as file:
        assert file["mu"].shape == (64,)
        assert file["sigma"].shape == (64, 64)
        np.testing.assert_array_equal(
            file["arr_0"],
            np.concatenate([*open_images("digits", None, "test").batches(99)]),
        )
    program(evaluate, whole, DIGITS[0], f"--reference={made}", f"--out={out}")
    found = json.loads(out.read_text())["metrics"]
    assert found == pytest.approx(results["metrics"], rel=1e-6)
    few = tmp_path / "cfg1.5.npz"
    np.savez(few, arr_0=np.load(whole)["arr_0"][:40])
    program(evaluate, few, *DIGITS)
    said = "cfg1.5.npz: 40 images give the covariance of 64 features"
    assert said in capsys.readouterr().out
    small, stats = tmp_path / "small.npz", tmp_path / "stats.npz"
    np.savez(small, arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(stats, mu=np.zeros(64), sigma=np.eye(64))
    for arguments, message in (
        ([small, *DIGITS], "small.npz has images (9, 16, 16, 3), digits (360, 32"),
        ([stats, *DIGITS], "stats.npz: has statistics alone"),
        ([small], "give one of --reference and --make_reference"),
        ([few, f"--reference={made}", "--out={other}"], "the Inception weights of FID"),
        ([whole, "--features=digits", f"--reference={few}", "--out=x"], "end in .json"),
        ([few, *DIGITS], "cfg1.5.json: exists already"),
    ):
        arguments = [str(a).format(other=tmp_path / "other.json") for a in arguments]
        with one_line(message):
            program(evaluate, *arguments)


def test_sweep(finished, results, program, tmp_path, monkeypatch, capsys):
    """A killed sweep goes on. Scale 1 is the plain sample, whatever the interval; the
    other cells, made up here, have their guidance in the config, and of the head its
    parameters."""
    out = tmp_path / "sweep"
    call = [finished[1], f"--out={out}", *DIGITS, "--num=80"]
    call += ["--guidance=4,1", "--interval=0:1,0:0.5"]
    run_cell, cells = sweep.run_cell, []

    def counted(generate, features, reference, cell, count):
        kind = "head_guidance" if "heads" in generate.params else "guidance"
        s = vars(generate.config.sampling)
        assert cell == (s[kind], s[f"{kind}_low"], s[f"{kind}_high"])
        cells.append("killed" if len(cells) == 2 else cell)
        if cells[-1] == "killed":
            raise KeyboardInterrupt
        if cell[0] == 1:
            return run_cell(generate, features, reference, cell, count)
        return {name: cell[2] for name in results["metrics"]}

    monkeypatch.setattr(sweep, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        program(sweep, *call)
    program(sweep, *call)
    assert cells == [(1, 0, 1), (4, 0, 1), "killed", (4, 0, 0.5)]
    written = json.loads((out / "sweep.json").read_text())
    found = {tuple(c[n] for n in sweep.NAMES): c["metrics"] for c in written["cells"]}
    assert [*found] == [(1, 0, 1), (4, 0, 1), (4, 0, 0.5)]
    assert found[1, 0, 1] == pytest.approx(results["metrics"], rel=1e-6)
    assert written["settings"]["seed"] == finished[0].seed
    table = (out / "sweep.md").read_text()
    assert table.count("\n| 4 |") == 2
    assert table.count("**") == 2
    assert table in capsys.readouterr().out
    with Image.open(out / "sweep.png") as picture:
        assert min(picture.size) > 300
    with one_line("num_samples is 80 there, 40 now"):
        program(sweep, *call, "--num=40")
    call[1] = f"--out={tmp_path / 'head'}"
    program(sweep, *call, "--of=head_guidance", "--guidance=2", "--interval=0:1")
    assert cells[4:] == [(2, 0, 1)]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--guidance=1,two", "--guidance: invalid scales value: .1,two"),
        ("--guidance=-1", "config.sampling.guidance=-1.0: must lie between"),
        ("--interval=0.7:0.2", "guidance_low=0.7 must not exceed"),
        ("--interval=0.5", "--interval: invalid intervals value: .0.5"),
        ("--num=1", "--num=1: must be at least 2"),
    ],
)
def test_sweep_refusals(finished, program, tmp_path, flag, message):
    with one_line(match=message):
        program(sweep, finished[1], f"--out={tmp_path / 'o'}", *DIGITS, *flag.split())
    assert not list(tmp_path.iterdir())
