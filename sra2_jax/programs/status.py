"""How runs are doing: python -m sra2_jax status WORKDIR [WORKDIR ...] [--json].

Reads a run's folder, also while the run writes it; neither jax nor TensorFlow.
"""

import datetime
import json
import os
import socket
import statistics
import sys
import time
from typing import Any

from sra2_jax.command import Parser
from sra2_jax.errors import MISTAKE, UserError
from sra2_jax.run import ASIDE, STALE_SECONDS, Run, number
from sra2_jax.storage import stat

ROWS = 20  # of which the speed is the median


def read_status(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run's folder says, None for what it does not (yet).

    `step`, `loss`, `skipped` (updates, from step `skipped_since` on) and
    `images_per_second` are of the log; `seconds_left` is without evaluations;
    `checkpoint` is the newest whole one; `set_aside` are damaged ones; `running` says
    whether a process holds the folder and gives signs of life, `holder` which.

    Raises UserError: no run is there.
    """
    run = Run(workdir)
    if not run.exists():
        raise UserError(f"{run}: no run is there: give the workdir of one")
    config, rows = run.read("config"), run.rows()
    steps, batch = (number(config, key) for key in ("steps", "batch_size"))
    whole = next((step for step in run.steps() if run.whole(step)), None)
    step = max((row["step"] for row in rows), default=whole)
    losses, speeds = (
        [value for row in rows if (value := number(row, key)) is not None]
        for key in ("loss", "images_per_second")
    )
    speed = statistics.median(speeds[-ROWS:]) if speeds else None
    left = None
    if speed and not (step is None or steps is None or batch is None):
        left = max(steps - step, 0) * batch / speed
    checkpoint = None
    if whole is not None:
        written = run.checkpoints / str(whole) / "fingerprint" / "metadata"
        checkpoint = {"step": whole, "seconds_old": _since(stat(written)[1])}
    return {
        "workdir": str(run),
        "name": config.get("name"),
        "step": step,
        "steps": steps,
        "finished": bool(steps and run.finished(steps)),
        "loss": losses[-1] if losses else None,
        "images_per_second": speed,
        "seconds_left": left,
        "seconds_since_row": _since(stat(run.metrics)[1]) if rows else None,
        "skipped": int(sum(number(row, "skipped") or 0 for row in rows)),
        "skipped_since": rows[0]["step"] if rows else None,
        "checkpoint": checkpoint,
        "set_aside": sorted(path.name for path in run.checkpoints.glob(f"{ASIDE}*")),
        **_holder(run.read("lock")),
    }


def _since(moment: float) -> float:
    return max(time.time() - moment, 0.0)


def _holder(lock: dict[str, Any]) -> dict[str, Any]:
    """Who has the folder, as lock.json says, and whether it is alive."""
    beat, pid = number(lock, "beat"), number(lock, "pid")
    if beat is None or pid is None:
        return {"running": False, "holder": None}
    holder = {key: lock.get(key) for key in ("host", "pid", "started")}
    silent, here = _since(beat), lock.get("host") == socket.gethostname()
    running = silent < STALE_SECONDS and (not here or _alive(pid))
    return {"running": running, "holder": holder | {"seconds_silent": silent}}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def describe(status: dict[str, Any]) -> str:
    """A few lines for a person."""
    step, steps, speed = (status[k] for k in ("step", "steps", "images_per_second"))
    line = f"{status['workdir']}: "
    line += "no step yet" if step is None else f"step {step:,}"
    if steps:
        line += f" of {steps:,} ({(step or 0) / steps:.1%})"
    lines = [line + (", finished" if status["finished"] else "")]
    if status["loss"] is not None:
        lines.append(f"loss: {status['loss']:.6g}")
    if speed is not None:
        line = f"speed: {speed:,.1f} images/s"
        if status["seconds_left"] is not None and not status["finished"]:
            line += f", {_duration(status['seconds_left'])} left without evaluations"
        lines.append(f"{line}, logged {_duration(status['seconds_since_row'])} ago")
    if status["skipped"]:
        lines.append(
            f"skipped: {status['skipped']} updates since step "
            f"{status['skipped_since']:,}, see events.jsonl"
        )
    line = "none"
    if saved := status["checkpoint"]:
        ago = _duration(saved["seconds_old"])
        line = f"step {saved['step']:,}, {ago} ago, whole, with its fingerprints"
    lines.append(f"checkpoint: {line}")
    if aside := status["set_aside"]:
        lines.append(f"damaged, set aside: {len(aside)} ({', '.join(aside[:5])})")
    line = "running: no"
    if holder := status["holder"]:
        state = "running" if status["running"] else "lost, or hangs"
        line = (
            f"{state}: process {holder['pid']} on {holder['host']}, since "
            f"{holder['started']}, last sign of life "
            f"{_duration(holder['seconds_silent'])} ago"
        )
    return "\n  ".join([*lines, line])


def _duration(seconds: float) -> str:
    """Days, hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each")
    arguments = parser.parse_args()
    status = 0
    for name in arguments.workdirs:
        try:
            found = read_status(name)
            print(json.dumps(found) if arguments.json else describe(found))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = MISTAKE
    return status
