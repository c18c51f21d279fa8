"""CLIP score against transformers', and with each image its own prompt."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.models import apply
from sra2_jax.weights import tokenizer
from tests.conftest import ROOT, one_line
from tools import text_score

CLIP = str(ROOT / "tests" / "golden" / "clip")
CASE = ROOT / "tools" / "tests" / "clip_score.npz"


def test_mean_over_images_with_their_prompts(tmp_path, monkeypatch, capsys):
    network, params = text_score.load(CLIP)
    with np.load(CASE) as case:
        images, tokens = (jnp.asarray(case[k]) for k in ("images", "input_ids"))
        found = apply(network, params, images, tokens)
        np.testing.assert_allclose(found, case["text_score"], rtol=1e-5)

    prompts = ["a red digit", "blue sky"]
    made_of = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    settings = np.array(json.dumps({"prompts": made_of}))
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (5, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, settings=settings)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))

    def scored(prompts):
        words = f"text_score {tmp_path}/x.npz --clip={CLIP} --prompts={prompts}"
        monkeypatch.setattr("sys.argv", words.split(maxsplit=3))
        text_score.main()
        return float(capsys.readouterr().out.split(": ")[-1].split()[0])

    tokens = tokenizer(CLIP)(prompts)[[0, 1, 0, 1, 0]].astype(np.int32)
    expected = apply(network, params, jnp.asarray(images), jnp.asarray(tokens)).mean()
    assert scored(tmp_path / "prompts.txt") == pytest.approx(float(expected), rel=1e-4)
    with one_line("made of other prompts than --prompts"):
        scored("blue sky")
    with one_line("no images, or no prompts"):
        (tmp_path / "prompts.txt").write_text("")
        scored(tmp_path / "prompts.txt")
