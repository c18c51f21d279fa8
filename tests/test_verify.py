import json

import numpy as np
import pytest

from sra2_jax.errors import UserError
from sra2_jax.programs import steps
from sra2_jax.programs.verify import verify

# file -> number of its cases
COVERED = {
    "alignment_losses": 4, "center_crop": 4, "interpolants": 12, "samplers": 24,
    "sit": 1, "sit_learn_sigma": 1, "repa_sit": 3, "sra_sit": 3, "vae": 4,
    "dinov2": 1, "clip": 3, "adm_metrics": 6, "inception": 3, "ig_samplers": 16,
    "lightning_full": 4, "lightning_wo_shift": 4, "lightning_qknorm_layernorm": 4,
    "lightning_rope_only": 4, "mmdit": 2, "ldm_vae": 4,
}  # fmt: skip


def test_golden_files_pass(golden, capsys):
    assert verify(golden) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, cases in COVERED.items():
        rows = [x for x in lines if x.startswith((f"{name}.npz: ", f"{name}/"))]
        assert len(rows) == cases, name
    assert not [x for x in lines if x.endswith("FAILED")]
    assert not [x for x in lines if x.endswith("kind not covered yet")]


def test_what_is_wrong_fails(tmp_path, golden, capsys):
    """Numbers, NaN, a shape, half a file, a weight or a head that is not there."""

    def save(name, source, changes=(), without="nothing"):
        data = {k: v for k, v in np.load(golden / source).items() if without not in k}
        np.savez(tmp_path / name, **data | dict(changes))

    losses = "alignment_losses.npz"
    l1, l2 = (np.load(golden / losses)[name] for name in ("l1", "l2"))
    save("numbers", losses, {"l1": 1.01 * l1, "l2": [l2] * 2, "cosine": np.nan})
    save("short", "sit.npz", without="w/blocks.1.attn.qkv.bias")
    save("headless", "sra_sit.npz", without="ap_head")
    (tmp_path / "cut.npz").write_bytes((golden / "sit.npz").read_bytes()[:1000])
    assert verify(tmp_path) == 1
    out = capsys.readouterr().out
    for words in (
        "numbers.npz: l1: 9.9e-03 (<= 1e-04) FAILED",
        "numbers.npz: l2: inf",
        "numbers.npz: cosine: nan",
        "cut.npz: FAILED",
        "blocks.1.attn.qkv.bias is missing",
        "headless.npz: FAILED: KeyError: 'projected'",
        "3 passed, 6 failed",
    ):
        assert words in out


def test_strict_fails_on_kinds_not_covered(tmp_path):
    np.savez(tmp_path / "new.npz", something=np.zeros(3))
    assert verify(tmp_path) == 0
    assert verify(tmp_path, strict=True) == 1


def test_without_golden_files(tmp_path):
    with pytest.raises(UserError, match="no golden"):
        verify(tmp_path)


def test_first_steps(monkeypatch, capsys):
    """Another number is found, in its band; tools/tests/test_first_steps.py trains."""
    rows = [json.loads(line) for line in steps.RECORDED.read_text().splitlines()]
    assert len(rows) >= 100
    rows[50]["grad_norm"] *= 1.01
    monkeypatch.setattr(steps, "first_steps", lambda: iter(rows))
    assert steps.verify_steps(50) == 0
    assert steps.verify_steps(60) == 1
    assert "steps 11 to 60: 1.0e-02 (<= 1e-03) FAILED" in capsys.readouterr().out
