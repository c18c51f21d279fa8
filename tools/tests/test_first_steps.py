"""The first steps of SiT-B/2 are those that are shipped."""

from sra2_jax.programs.steps import verify_steps


def test_the_first_one(monkeypatch, capsys):
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert verify_steps(1) == 0
    assert "steps 1 to 1: " in capsys.readouterr().out
