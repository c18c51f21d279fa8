"""Text to image: captions from the encoder to samples, with MMDiT."""

import hashlib
import json
import tarfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

import sra2_jax as sra
from sra2_jax import sharding
from sra2_jax.alignment import HEAD_NAMES
from sra2_jax.config import CAPTIONS, Config
from sra2_jax.data import digits, records
from sra2_jax.data.captions import captioned
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.generator import draw_labels, generate, open_run
from sra2_jax.log import Log
from sra2_jax.models import apply
from sra2_jax.observe import Observer
from sra2_jax.programs import convert, pull, push, sample
from sra2_jax.run import Run
from sra2_jax.runtime import Watch
from sra2_jax.step import Program
from sra2_jax.train import train
from sra2_jax.weights import load_clip, spelled, tokenizer
from sra2_jax.weights.sit import from_reference, to_reference
from tests.conftest import ROOT, one_line
from tests.hub import hub
from tests.test_encode import read_with_tfds
from tools.probes import Subject

GOLDEN = ROOT / "tests" / "golden"
CLIP, DINOV2, VAE = (str(GOLDEN / name) for name in ("clip", "dinov2", "vae"))
SIDE = 16
TEXTS = {
    "a": ["A red digit", "a small red picture"],
    "deep/b": [f"digit {n}" for n in ("one", "two", "three", "four", "five", "six")],
    "c": ["blue sky and water"],
}
START, END, A, RED, DIGIT = 97, 98, 1, 25, 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions beside them, one without, and COCO's file of the same."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("captioned")
    rows = {"images": [], "annotations": []}
    for number, (name, texts) in enumerate(TEXTS.items()):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 20, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text("\n".join(["", *texts]))
        rows["images"].append({"id": 7 * number, "file_name": f"{name}.png"})
        for text in texts:
            row = {"image_id": 7 * number, "caption": f" {text}\n", "id": 0}
            rows["annotations"].append(row)
    Image.new("RGB", (20, 24)).save(folder / "images" / "none.png")
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def encoded(folder, out, captions="txt", **more):
    own = {"images": str(folder / "images"), "out": str(out), "vae": VAE}
    own |= {"resolution": SIDE, "captions": captions, "text_encoder": CLIP}
    return encode(EncodeOptions(**own | more))


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "latents"
    encoded(folder, out)
    return out


def config(latents, **changes):
    values = {
        "steps": 2, "batch_size": 8, "vae": VAE, "text.encoder": CLIP,
        "data.dir": str(latents), "data.num_classes": 1, "data.resolution": SIDE,
        "latents.size": 8, "model.width": 32, "model.depth": 3, "model.heads": 2,
        "model.dtype": "float32", "align.vae.depth": 2, "align.vae.head_layers": 2,
        "run.log_every": 1, "run.checkpoint_every": 2, "run.grid_columns": 1,
        "run.grid_classes": 3, "sampling.steps": 3, "sampling.guidance": 2.0,
        "sampling.batch_size": 8,
    }  # fmt: skip
    return Config().override(values | changes)


@pytest.fixture(scope="module")
def trained(latents):
    """A program with two alignments whose encoder is trained along, and its state."""
    own = config(latents, **{
        "text.train": True, "text.prompts": "a red digit; blue sky ;",
        "align.teacher.enabled": True, "align.teacher.depth": 1,
        "align.teacher.teacher_depth": 2,
    })  # fmt: skip
    program = Program(own, sharding.make_mesh(devices=jax.devices()[:1]))
    return program, program.start()


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """It encodes its images, trains the encoder along and scores its samples."""
    parent = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(1).integers(0, 256, (12, SIDE, SIDE, 3), np.uint8)
    np.savez(parent / "real.npz", arr_0=images)
    own = config("", **{
        "data.images": str(folder / "images"), "text.train": True,
        "eval.features": "dinov2", "eval.dinov2": DINOV2, "eval.num_samples": 12,
        "eval.reference": str(parent / "real.npz"),
    })  # fmt: skip
    train(own, str(parent / "run"))
    return parent / "run"


def batch(count=8, length=24):
    draw = np.random.default_rng(0)
    return {
        "mean": draw.normal(size=(count, 8, 8, 4)).astype(np.float16),
        "std": np.full((count, 8, 8, 4), 0.1, np.float16),
        "captions": draw.integers(0, 97, (count, CAPTIONS + 1, length), np.uint16),
    }


@pytest.mark.usefixtures("heavy")
def test_captions_become_tokens(folder, latents, tmp_path):
    """The first five, again where there are fewer, and of the empty one; as COCO keeps
    them, and for TFDS. An image without one is left out."""
    info = records.LatentsInfo.read(latents)
    assert info.captions == records.Captions(CLIP, CAPTIONS, 24)
    _, rows = read_with_tfds(latents)
    found = {index: row["captions"] for index, row in rows.items()}
    assert len(found) == len(TEXTS)  # in the order of names: a, c, deep/b
    assert found[0][0].tolist()[:6] == [START, A, RED, DIGIT, END, END]
    np.testing.assert_array_equal(found[0][2], found[0][0])
    np.testing.assert_array_equal(found[1][4], found[1][0])
    assert len({row.tobytes() for row in found[2]}) == CAPTIONS + 1
    for row in found.values():
        assert row[-1].tolist() == [START] + 23 * [END]
    how = {"crop": "square", "store_images": True}
    encoded(folder, tmp_path / "coco", str(folder / "captions.json"), **how)
    rows = read_with_tfds(tmp_path / "coco")[1]
    for index, row in rows.items():
        np.testing.assert_array_equal(row["captions"], found[index])
    with Image.open(folder / "images" / "a.png") as image:  # cropped as COCO's
        square = image.crop((0, 2, 20, 22)).resize((SIDE, SIDE), Image.LANCZOS)
    np.testing.assert_array_equal(rows[0]["image"], square)


def test_tars_and_tables_hold_the_same(folder, tmp_path):
    """webdataset's, in two files, and Hugging Face's, in two row groups."""
    import pyarrow
    from pyarrow import parquet

    root, kinds = folder / "images", {}
    names = [str(p.relative_to(root)) for p in sorted(root.rglob("*.png"))]
    wanted = captioned(str(root), "txt")
    for part in (0, 1):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name in names[part::2]:
                for file in (name, name.replace("png", "txt")):
                    if (root / file).exists():
                        tar.add(root / file, file)
    kinds["txt"] = captioned(str(tmp_path), "txt")
    texts = [TEXTS.get(name.removesuffix(".png")) for name in names]
    images = [{"bytes": (root / name).read_bytes(), "path": name} for name in names]
    table = pyarrow.table({"image": images, "texts": texts})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    kinds["texts"] = captioned(str(tmp_path / "x.parquet"), "texts")
    for source in kinds.values():
        assert source.left_out == wanted.left_out == "1 images without caption"
        found = {
            source.captions(e.index)[0]: e.load() for e in source.entries([2, 0, 1])
        }
        assert len(found) == source.length == 3
        for entry in wanted.entries():
            image = found[wanted.captions(entry.index)[0]]
            np.testing.assert_array_equal(image, entry.load())
    with one_line("its columns are ['image', 'texts']"):
        captioned(str(tmp_path / "x.parquet"), "text")


def test_encode_refuses(folder, tmp_path):
    (tmp_path / "odd.json").write_text('{"images": []}')
    with one_line("captions cannot be read"):
        encoded(folder, tmp_path / "x", str(tmp_path / "odd.json"))
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (20, 24)).save(tmp_path / "bare" / "none.png")
    with one_line("none of its 1 images has a caption"):
        encoded(folder, tmp_path / "x", images=str(tmp_path / "bare"))
    with one_line("give both or none"):
        encoded(folder, tmp_path / "x", text_encoder="")
    with one_line("tokenizer.json: no tokenizer"):
        encoded(folder, tmp_path / "x", text_encoder=VAE)


def test_draws(latents):
    """Each caption as often as the others, the empty one at the rate of dropout."""
    program = Program(config(latents), sharding.make_mesh(devices=jax.devices()[:1]))
    rows = batch(4000)
    rows["captions"][:] = np.arange(CAPTIONS + 1)[:, None]
    y = np.asarray(jax.jit(program.draw)(rows, jnp.asarray(3))["y"])
    assert y.shape == (4000, 24)
    share = np.bincount(y[:, 0]) / 4000
    assert share[-1] == pytest.approx(0.1, abs=0.015)
    np.testing.assert_allclose(share[:-1], 0.9 / CAPTIONS, atol=0.02)


def test_trains_alike_on_one_and_eight_devices(trained, monkeypatch):
    """Scanned or unrolled; split, both streams of all blocks."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 100)
    program, state = trained
    own = program.config.override({
        "mesh.fsdp": 2, "mesh.tensor": 2, "accumulate": 2, "model.scan": False,
    })  # fmt: skip
    split = Program(own, sharding.make_mesh(own.mesh))
    found, state = [], jax.device_get(state)
    for each in (program, split):
        step, place = each.compile(), sharding.batch_sharding(each.mesh)
        now = jax.device_put(state, each.places)
        for _ in range(3):
            now, metrics = step(now, jax.device_put(batch(), place))
        found.append({k: float(v) for k, v in metrics.items()})
    for block in (now.params["network"][name] for name in ("blocks", "last")):
        for layer in ("qkv", "mlp_out", "text_qkv"):
            kernel = block[layer]["kernel"]
            assert 4 * kernel.addressable_shards[0].data.size == kernel.size
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert {"loss_align_vae", "loss_align_teacher"} <= found[0].keys()


def test_teacher_is_the_first_blocks(trained):
    """One, two or all, of the whole network, here unrolled, whose last lies apart."""
    program, state = trained
    draw, network = np.random.default_rng(0), state.params["network"]
    x, t, y = (draw.normal(size=s) for s in ((2, 8, 8, 4), (2,), (2, 24, 48)))
    x, t, y = (jnp.asarray(a, jnp.float32) for a in (x, t, y))
    depths, teacher = (1, 2, 3), program.alignments["teacher"]

    @jax.jit
    def targets(network, draws):
        run = program.running, None, network, draws
        return {
            n: replace(teacher, teacher_depth=n).compute_target(*run) for n in depths
        }

    found = targets(network, {"x_teacher": x, "t_teacher": t, "y": y})
    unrolled = program.running.clone(model=replace(program.config.model, scan=False))
    _, kept, _ = jax.jit(lambda *inputs: apply(unrolled, *inputs, depths))(
        network, x, t, y
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, kept
    )


def test_a_trained_encoder_is_read_as_a_frozen_one(latents, trained):
    """The loss is the same, and its gradient that of finite differences."""
    program, state = trained
    frozen = Program(program.config.override({"text.train": False}), program.mesh)
    assert set(frozen.frozen) == {"text"}
    assert set(program.frozen) == set()
    zero = jnp.zeros((), jnp.int32)
    draws = jax.jit(program.draw)(batch(), zero)
    params, ema = dict(state.params), state.ema["network"]
    text = params.pop("text")
    wanted, _ = jax.jit(frozen.loss)(params, ema, {"text": text}, draws, zero)

    @jax.jit
    def along(text):
        def losses(text):
            total, metrics = program.loss(
                {**params, "text": text}, ema, {}, draws, zero
            )
            return metrics["loss_denoise"], total

        found, gradient = jax.value_and_grad(losses, has_aux=True)(text)
        return found, gradient, optax.tree.norm(gradient)

    (_, total), gradient, size = jax.device_get(along(text))
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    step, text = 0.01, jax.device_get(text)
    shift = jax.tree.map(lambda g: step * g / size, gradient)
    ahead, back = (
        along(jax.tree.map(f, text, shift))[0][0] for f in (np.add, np.subtract)
    )
    assert float(ahead - back) / (2 * step) == pytest.approx(size, rel=0.02)


def test_and_samples_as_one(latents, trained, tmp_path):
    """With CLIP's weights for its own; the config's prompts are rows of the grid."""
    program, state = trained
    frozen = Program(config(latents), program.mesh)
    prompts = ["a red digit", "blue sky"]
    found = generate(frozen, state.params, prompts)
    assert found.shape == (2, SIDE, SIDE, 3)
    params = {**state.params, "text": load_clip(CLIP)[1]}
    np.testing.assert_array_equal(generate(program, params, prompts), found)
    run = Run(tmp_path, writes=True)
    with Log(run, program.config) as log:
        observer = Observer(program, run, log, latents, Watch())
        observer.observe(program.config.run.sample_every, params)
    assert observer.facts["prompts"] == prompts
    with Image.open(run.samples(program.config.run.sample_every)) as picture:
        assert np.asarray(picture).shape[0] / picture.width == (2 + 2 * (SIDE + 2)) / (
            4 + SIDE
        )


def test_digits_have_captions():
    """Each half of a pair is a digit of its word; ten pairs are held out."""
    images, texts = digits.load_captioned("train")
    real, labels = digits.load_digits("train")
    halves = [half.tobytes() for half in digits.squeezed(real)]
    known = dict(zip(halves, labels, strict=True))
    assert texts[0][0] == f"a handwritten {digits.WORDS[labels[0]]}"
    np.testing.assert_array_equal(images[: len(real)], real)
    pairs = set()
    for image, (text, _) in zip(images[len(real) :], texts[len(real) :], strict=True):
        halves = np.split(image, 2, axis=1)
        left, right = (int(known[half.tobytes()]) for half in halves)
        assert text == f"two digits, {digits.WORDS[left]} then {digits.WORDS[right]}"
        pairs.add((left, right))
    absent = {(a, b) for a in range(10) for b in range(10)} - pairs
    assert absent == {(a, (a + 3) % 10) for a in range(10)}
    numbers = tokenizer("words")([text[0] for text in texts])
    assert numbers.min() > 0  # every word is known
    assert spelled("words", numbers[-1:])[0].replace(" ,", ",") == texts[-1][0]


def test_init_is_pytorchs(trained):
    """Kernels and biases uniform within 1 / sqrt(inputs); nothing starts at zero."""
    network = trained[1].params["network"]
    for layer, inputs in ((network["text"], 48), (network["blocks"]["qkv"], 32)):
        for x in layer.values():
            bound = inputs**-0.5
            assert 0.9 * bound < np.abs(x).max() <= bound
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert np.abs(network["final"]["linear"]["kernel"]).min() > 0


def test_weights_go_out_and_come_back(trained):
    program, params = trained[0], jax.device_get(trained[1].params)
    names = to_reference(
        params["network"], params["heads"], HEAD_NAMES, program.network
    )
    assert "joint_blocks.2.x_block.mlp.fc1.weight" in names
    assert "joint_blocks.2.context_block.attn.proj.weight" not in names
    found = from_reference(names, program.network, params["heads"], HEAD_NAMES)
    jax.tree.map(
        np.testing.assert_array_equal, found, (params["network"], params["heads"])
    )  # its encoder has no place there


@pytest.mark.filterwarnings("ignore:Use 'content")  # httpx's, of the client's way
def test_a_file_becomes_a_run(latents, trained, tmp_path, monkeypatch, as_file):
    """And has no classes, to fine-tune for or to draw; the hub gets its encoder."""
    own, network = config(latents), jax.device_get(trained[1].params["network"])
    tensors = to_reference(network, {}, HEAD_NAMES, trained[0].network)
    np.savez(tmp_path / "x.npz", **tensors)
    words = f"convert import {tmp_path}/x.npz --workdir={tmp_path}/run".split()
    words.append(f"--config={as_file(ConfigDict(own.to_dict()))}")
    monkeypatch.setattr("sys.argv", words)
    convert.main()
    images = open_run(str(tmp_path / "run"), own)
    jax.tree.map(np.testing.assert_array_equal, images.params["network"], network)
    again = [*words, f"--workdir={tmp_path}/other", "--classes=3"]
    monkeypatch.setattr("sys.argv", again)
    with one_line("captions have none"):
        convert.main()
    with one_line("no classes to draw"):
        draw_labels(own, np.arange(3))
    with hub(monkeypatch, tmp_path / "cache") as server:
        push.push(str(tmp_path / "run"), "owner/words")
        pull.pull("owner/words", str(tmp_path / "pulled"))
    files = server.repos["owner/words"]
    card, sent = files["README.md"].decode(), json.loads(files["config.json"])
    assert "An MMDiT of" in card
    assert "text-to-image" in card
    assert (sent["vae"], sent["text"]["encoder"]) == ("vae", "text_encoder")
    there = sra.load_run(str(tmp_path / "pulled"))
    assert there.config.text.encoder == str(tmp_path / "pulled" / "text_encoder")
    made = (sra.generate(r.program, r.params, ["a red digit"]) for r in (images, there))
    np.testing.assert_array_equal(*made)


def test_macs_are_those_of_the_products(latents):
    """XLA counts the operations of one forward pass."""
    large = config(latents, **{"model.scan": False, "model.width": 256})
    network = Program(large, sharding.make_mesh()).network
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.inputs())
    run = jax.jit(lambda params, *inputs: apply(network, params, *inputs)[0])
    counted = run.lower(shapes["params"], *network.inputs()).cost_analysis()["flops"]
    assert 2 * network.macs(3) == pytest.approx(counted, rel=0.06)


def test_a_run_samples_prompts(run, latents, tmp_path, monkeypatch):
    """Its grid has the captions of the records; a file of prompts, or one."""
    assert Run(run).samples(2).exists()
    scores = Run(run).read("results")["metrics"]
    assert scores.keys() == {"fd_dinov2", "kernel_distance"}
    assert scores["fd_dinov2"] > 0
    prompts = Run(run).read("run")["prompts"]
    assert (
        {"blue sky and water"}
        < set(prompts)
        < {t.lower() for x in TEXTS.values() for t in x}
    )
    page = Run(run).report.read_text()
    assert "FD-DINOv2" in page
    assert all(f"<li>{prompt}</li>" in page for prompt in prompts)
    both_file = tmp_path / "prompts.txt"
    both_file.write_text("a red digit\n\nblue sky\n")

    def made(name, *words):
        words = ["sample", str(run), f"--out={tmp_path / name}.npz", *words]
        monkeypatch.setattr("sys.argv", words)
        sample.main()
        with np.load(tmp_path / f"{name}.npz") as file:
            return dict(file)

    both = made("both", f"--prompts={both_file}", "--num=5")
    assert both["arr_0"].shape == (5, SIDE, SIDE, 3)
    assert both["arr_1"].tolist() == [0, 1, 0, 1, 0]
    one = made("one", "--prompts=a red digit")
    np.testing.assert_array_equal(one["arr_0"], both["arr_0"][:1])
    words = [*f"sample {run} --out={tmp_path}/x.png".split(), f"--prompts={both_file}"]
    monkeypatch.setattr("sys.argv", words)
    sample.main()
    with Image.open(tmp_path / "x.png") as picture:  # a column a prompt, eight rows
        assert picture.size == (2 + 2 * (SIDE + 2), 2 + 8 * (SIDE + 2))
        first = np.asarray(picture)[2 : 2 + SIDE, 2 : 2 + SIDE]
    np.testing.assert_array_equal(first, both["arr_0"][0])
    words = f"convert export {run} --out={tmp_path}/x.npz".split()
    monkeypatch.setattr("sys.argv", words)
    with one_line("text.train=True: the encoder has no place in SiT's names"):
        convert.main()
    with one_line("needs --prompts"):
        made("none")
    prompts = hashlib.sha256(b"a red digit\nblue sky").hexdigest()
    assert json.loads(str(both["settings"]))["prompts"] == prompts


def test_blocks_are_told_the_caption(run, latents):
    """By the figures of tools: another, the empty one, changes what they compute."""
    subject = Subject(str(run))
    images = subject.read_images(latents, 3, 3)
    assert images.label.shape == (3, 2, 24)
    (told,), (bare,) = (
        subject.open_blocks([2], labelled)[1](images, 0.5) for labelled in (True, False)
    )
    assert told[2].shape == (3, 16, 32)
    np.testing.assert_array_equal(told[0], bare[0])
    assert np.abs(told[2] - bare[2]).max() > 1e-4


def test_config_refuses(latents):
    with one_line("captions name no digits"):
        config(latents, **{"eval.features": "digits"})
    with one_line("text.encoder='words' needs config.text.train"):
        config(latents, **{"text.encoder": "words"})
    with one_line("MMDiT has two blocks or more"):
        config(latents, **{"model.depth": 1, "align.vae.depth": 1})
