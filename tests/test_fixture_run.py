"""A run written by an earlier version goes on to the same numbers.

tests/fixture_run is a run with all three alignments that SIGTERM stopped at step 4 of
8, and beside it, rows.json, what the run logs, on a processor of AMD: one of Intel's
differs in the last digit. Steps 5 to 8 are of today's order of examples; with that of
the version that wrote it they were that version's, digit for digit. A change of what it
takes to read it must be meant, and said.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import pinned

FIXTURE = Path(__file__).parent / "fixture_run"
# Those that wrote it.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false"
)


@pinned
@pytest.mark.timeout(900)  # of a busy machine
def test_goes_on_to_the_same_numbers(tmp_path, start):
    def done(*words):
        process = start(*words, environment={"XLA_FLAGS": FLAGS}, no_pictures=1)
        assert process.status(800) == 0, process.text
        return process.text

    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    said = json.loads(done("status", run, "--json"))
    assert (said["step"], said["steps"], said["finished"]) == (4, 8, False)
    assert said["checkpoint"]["step"] == 4
    arguments = (FIXTURE / "arguments.txt").read_text().split()
    printed = done(f"--workdir={run}", *arguments)
    assert "resumed with" not in printed  # the same config
    rows = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    expected = json.loads((FIXTURE / "rows.json").read_text())
    for row, wanted in zip(rows, expected, strict=True):  # rows hold speeds besides
        assert {k: row[k] for k in wanted} == pytest.approx(wanted, rel=1e-6)
    assert not list((run / "checkpoints").glob("damaged*"))
