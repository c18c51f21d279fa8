import json
import shutil

import numpy as np
import pytest

from sra2_jax.errors import UserError
from sra2_jax.programs import steps
from sra2_jax.programs.verify import relative_error, verify

# file -> number of its cases
COVERED = {
    "alignment_losses": 4, "center_crop": 4, "interpolants": 12, "samplers": 24,
    "sit": 1, "sit_learn_sigma": 1, "repa_sit": 3, "sra_sit": 3, "vae": 4,
    "dinov2": 1, "adm_metrics": 6, "inception": 3, "ig_samplers": 16, "ldm_vae": 4,
    "lightning_full": 4, "lightning_wo_shift": 4, "lightning_qknorm_layernorm": 4,
    "lightning_rope_only": 4,
}  # fmt: skip
LATER = ("mmdit",)


def test_golden_files_pass(golden, capsys):
    assert verify(golden) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, cases in COVERED.items():
        rows = [x for x in lines if x.startswith((f"{name}.npz: ", f"{name}/"))]
        assert len(rows) == cases, name
    assert not [x for x in lines if x.endswith("FAILED")]
    skipped = [x for x in lines if x.endswith("kind not covered yet")]
    assert len(skipped) == len(LATER)


@pytest.mark.parametrize("value", [1.01, np.nan])
def test_a_wrong_number_fails(tmp_path, golden, capsys, value):
    data = dict(np.load(golden / "sit.npz"))
    data["out"][1, 2, 3, 4] *= value
    np.savez(tmp_path / "other_name.npz", **data)
    assert verify(tmp_path) == 1
    assert "other_name.npz: out: " in capsys.readouterr().out


def test_damaged_files_fail(tmp_path, golden, capsys):
    (tmp_path / "cut.npz").write_bytes((golden / "sit.npz").read_bytes()[:1000])
    data = dict(np.load(golden / "sit.npz"))
    data.pop("w/blocks.1.attn.qkv.bias")
    np.savez(tmp_path / "short.npz", **data)
    assert verify(tmp_path) == 1
    out = capsys.readouterr().out
    assert "cut.npz: FAILED" in out
    assert "short.npz: FAILED" in out
    assert "blocks.1.attn.qkv.bias" in out
    assert "2 failed" in out


def test_a_lost_head_fails(tmp_path, golden, capsys):
    """Expected outputs that nothing computes are not passed over."""
    data = {
        k: v for k, v in np.load(golden / "sra_sit.npz").items() if "ap_head" not in k
    }
    np.savez(tmp_path / "sra.npz", **data)
    assert verify(tmp_path) == 1
    assert "projected" in capsys.readouterr().out


def test_strict_fails_on_kinds_not_covered(tmp_path, golden):
    shutil.copy(golden / "mmdit.npz", tmp_path)
    assert verify(tmp_path) == 0
    assert verify(tmp_path, strict=True) == 1


def test_without_golden_files(tmp_path):
    with pytest.raises(UserError, match="no golden"):
        verify(tmp_path)


def test_relative_error():
    assert relative_error(np.ones(3), np.ones(4)) == float("inf")
    assert relative_error(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == (
        pytest.approx(0.1)
    )


def test_first_steps(monkeypatch, capsys):
    """Those of SiT-B/2 are the recorded ones; another number is found."""
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert steps.verify_steps(2) == 0
    assert "steps 1 to 2: " in capsys.readouterr().out
    rows = [json.loads(line) for line in steps.RECORDED.read_text().splitlines()]
    assert len(rows) >= 100
    rows[50]["grad_norm"] *= 1.01
    monkeypatch.setattr(steps, "first_steps", lambda: iter(rows))
    assert steps.verify_steps(50) == 0
    assert steps.verify_steps(60) == 1
    assert "steps 11 to 60: 1.0e-02 (<= 1e-03) FAILED" in capsys.readouterr().out
