"""The cost table against published counts and XLA's."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from sra2_jax.config import Config
from sra2_jax.config_file import default, set_size
from sra2_jax.generator import make_sampler
from tools import cost
from tools.cost import METHODS, counted, describe


@pytest.mark.parametrize(
    ("size", "grid", "macs"),
    [
        ("S", 32, 6.05),
        ("B", 32, 23.0),
        ("L", 32, 80.7),
        ("XL", 32, 118.64),
        ("XL", 64, 524.5),
    ],
)
def test_published_forward_macs(size, grid, macs):
    """DiT's Table 4 and the 512 px model."""
    config = default()
    set_size(config, size)
    config.latents.size = grid
    config.align.vae.enabled = False
    program = describe(Config.of(config))
    network, batch = program.network, program.config.batch_size
    assert network.macs(network.model.depth) / 1e9 == pytest.approx(macs, rel=3e-3)
    # A step is three forward passes.
    assert program.flops() == 6 * network.macs(network.model.depth) * batch


def test_xl_costs_what_the_paper_says():
    """675.1M, +18.6M, +4.0% for SRA 2, without a single array."""
    before = {id(x) for x in jax.live_arrays()}
    rows = {name: counted(Config(), name) for name in METHODS}
    assert not [x for x in jax.live_arrays() if id(x) not in before and x.size > 1000]
    row = rows["SRA 2"]
    assert f"{row['network_parameters'] / 1e6:.1f}" == "675.1"
    assert f"{row['head_parameters'] / 1e6:.1f}" == "18.6"
    assert f"{row['extra_percent']:.1f}" == "4.0"
    assert rows["vanilla"]["extra_percent"] == rows["vanilla"]["head_parameters"] == 0
    # REPA: three layers to 768; the encoder is DINOv2-B
    assert rows["REPA"]["head_parameters"] == (
        (1152 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 768
    )
    assert rows["REPA"]["external_parameters"] == pytest.approx(86.6e6, rel=1e-3)
    # SRA: 20 of 28 blocks once more, and D -> 2D -> D
    assert rows["SRA"]["extra_percent"] == pytest.approx(100 * 20 / 28 + 1.1, abs=0.5)
    both = rows["REPA"]["extra_percent"] + row["extra_percent"]
    assert rows["REPA + SRA 2"]["extra_percent"] == pytest.approx(both)
    for name, row in rows.items():  # XLA counts sums and exponentials, too
        assert 0 < row["xla_gflops"] / row["forward_gflops"] - 1 < 0.01, name


def test_guidance_by_the_head_costs_one_pass_and_a_twentieth():
    """XLA's count of the sampler at XL/2, unrolled: of a loop it counts one turn."""
    plain = {"model.scan": False, "sampling.method": "euler", "sampling.steps": 2}
    flops, rows = {}, jax.ShapeDtypeStruct((1,), jnp.int32)
    for scale in (1.0, 1.4):
        program = describe(Config().override(plain | {"sampling.head_guidance": scale}))
        lowered = make_sampler(program).lower(program.abstract.params, rows, rows)
        flops[scale] = lowered.cost_analysis()["flops"]
    assert 1.03 < flops[1.4] / flops[1.0] < 1.05


def test_stored_features_need_no_encoder():
    config = Config().override({"align.encoder.source": "features"})
    row = counted(config, "REPA")
    assert row["external_parameters"] == 0
    assert row["extra_percent"] < 2


def test_program(tiny, as_file, tmp_path, monkeypatch, capsys):
    """Text and JSON, with two methods timed."""
    tiny.model.depth = 1
    chosen = {title: METHODS[title] for title in ("vanilla", "SRA 2")}
    monkeypatch.setattr(cost, "METHODS", chosen)
    flags = [f"--{name}={as_file(tiny)}" for name in ("config", "measure")]
    flags += ["--batch_size=8", "--rounds=1", "--steps=1", f"--out={tmp_path}/cost"]
    monkeypatch.setattr("sys.argv", ["cost", *flags])
    cost.main()
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "cost" / "cost.json").read_text())
    rows = {row["method"]: row for row in facts["methods"]}
    assert list(rows) == ["vanilla", "SRA 2"]
    for name, row in rows.items():
        assert row["step_seconds"] > 0
        assert re.search(rf"^{re.escape(name)} +0\.0M", printed, re.MULTILINE)
    assert rows["vanilla"]["time_over_vanilla"] == 1
    assert rows["SRA 2"]["peak_bytes"] > rows["vanilla"]["peak_bytes"] > 1e5
