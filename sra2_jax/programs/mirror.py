"""A run's metrics and samples in W&B: python -m sra2_jax mirror RUN --to=wandb.

Reads the run's folder, on any machine that sees it, while the run goes on and to its
end; the job knows nothing of it. Run again it goes on where it was, but for
WANDB_MODE=offline, which starts anew.
"""

import importlib.util
import io
import time
from typing import Any

from PIL import Image

from sra2_jax.command import Parser
from sra2_jax.errors import UserError, explained
from sra2_jax.programs.status import read_status
from sra2_jax.run import Run, digest

PAUSE = 10.0  # seconds between two looks


def read_steps(run: Run) -> dict[int, dict[str, Any]]:
    """Each step's metrics in order, and its picture as "samples"."""
    steps: dict[int, dict[str, Any]] = {}
    for row in run.rows():
        named = {key: value for key, value in row.items() if key != "step"}
        steps[row["step"]] = steps.get(row["step"], {}) | named
    for step, path in run.sample_grids():
        steps[step] = steps.get(step, {}) | {"samples": path}
    return dict(sorted(steps.items()))


def mirror(workdir: str, project: str) -> None:
    """Send what a run has logged, and what it logs until it stops, to W&B.

    Raises UserError: no such run, no W&B, or it cannot be reached.
    """
    run = Run(workdir)
    read_status(workdir)  # a run is there
    if importlib.util.find_spec("wandb") is None:
        raise UserError("W&B is not installed: pip install -e '.[wandb]'")
    import wandb

    place = run.folder.resolve()
    # Of the folder, so that the same run goes on there.
    named = {"id": digest({"folder": str(place)})[:16], "name": place.name}
    with explained("W&B", "log in by `wandb login`, or set WANDB_MODE=offline"):
        there = wandb.init(
            project=project, config=run.read("config"), resume="allow", **named
        )
    sent = there.step - 1
    while True:
        running = read_status(workdir)["running"]
        steps = {step: row for step, row in read_steps(run).items() if step > sent}
        if running and steps:  # more may come of the newest
            steps.popitem()
        for step, row in steps.items():
            if picture := row.get("samples"):
                image = Image.open(io.BytesIO(picture.read_bytes()))
                row["samples"] = wandb.Image(image)
            there.log(row, step=step)
            sent = step
        if not running:
            break
        time.sleep(PAUSE)
    there.finish()
    print(f"{run}: sent up to step {sent}")


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", metavar="RUN", help="folder of a run")
    parser.add_argument("--to", choices=["wandb"], required=True, help="where")
    parser.add_argument("--project", default="sra2_jax", help="of W&B (%(default)s)")
    flags = parser.parse_args()
    mirror(flags.workdir, flags.project)
