"""How runs are doing: python -m sra2_jax status WORKDIR [WORKDIR ...] [--json].

Reads a run's folder, also while the run writes it; neither jax nor TensorFlow.
"""

import json
import os
import socket
import statistics
import sys
import time
from typing import Any

from etils import epath

from sra2_jax.command import Parser, run_program
from sra2_jax.errors import MISTAKE, UserError
from sra2_jax.lock import STALE_SECONDS
from sra2_jax.run import ASIDE, Run, number

ROWS = 20  # of which the speed is the median


def read_status(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run's folder says, None for what it does not (yet).

    `step`, `loss`, `skipped` (updates, from step `skipped_since` on) and
    `images_per_second` are of the log; `seconds_left` is without evaluations;
    `checkpoint` is the newest whole one; `set_aside` are damaged ones; `running` says
    whether a process holds the folder and gives signs of life, `holder` which.

    Raises:
      UserError: no run is there.
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
    if speed and step is not None and steps is not None and batch is not None:
        left = max(steps - step, 0) * batch / speed
    checkpoint = None
    if whole is not None:
        age = _age(run.checkpoints / str(whole))
        checkpoint = {"step": whole, "seconds_old": age}
    return {
        "workdir": str(run),
        "name": config.get("name"),
        "step": step,
        "steps": steps,
        "finished": bool(steps and run.finished(steps)),
        "loss": losses[-1] if losses else None,
        "images_per_second": speed,
        "seconds_left": left,
        "seconds_since_row": _age(run.metrics) if rows else None,
        "skipped": int(sum(number(row, "skipped") or 0 for row in rows)),
        "skipped_since": rows[0]["step"] if rows else None,
        "checkpoint": checkpoint,
        "set_aside": sorted(path.name for path in run.checkpoints.glob(f"{ASIDE}*")),
        **_holder(run.read("lock")),
    }


def _age(path: epath.Path) -> float | None:
    """Seconds since a file or folder was changed."""
    try:
        return max(time.time() - path.stat().mtime, 0.0)
    except OSError:
        return None


def _holder(lock: dict[str, Any]) -> dict[str, Any]:
    """Who has the folder, as lock.json says, and whether it is alive."""
    beat, pid = number(lock, "beat"), number(lock, "pid")
    if beat is None or type(pid) is not int:
        return {"running": False, "holder": None}
    silent = max(time.time() - beat, 0.0)
    holder = {key: lock.get(key) for key in ("host", "pid", "started")}
    running = silent < STALE_SECONDS
    if lock.get("host") == socket.gethostname():
        running = running and _alive(pid)
    return {"running": running, "holder": holder | {"seconds_silent": silent}}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


def describe(status: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [_progress(status)]
    if (loss := status["loss"]) is not None:
        lines.append(f"loss: {loss:.6g}")
    if (speed := status["images_per_second"]) is not None:
        line = f"speed: {speed:,.1f} images/s"
        if status["seconds_left"] is not None and not status["finished"]:
            line += f", {_duration(status['seconds_left'])} left without evaluations"
        if (age := status["seconds_since_row"]) is not None:
            line += f", logged {_duration(age)} ago"
        lines.append(line)
    if status["skipped"]:
        lines.append(
            f"skipped: {status['skipped']} updates since step "
            f"{status['skipped_since']:,}, see events.jsonl"
        )
    line = "none"
    if checkpoint := status["checkpoint"]:
        age = checkpoint["seconds_old"]
        ago = "" if age is None else f", {_duration(age)} ago"
        line = f"step {checkpoint['step']:,}{ago}, whole, with its fingerprints"
    lines.append(f"checkpoint: {line}")
    if aside := status["set_aside"]:
        lines.append(f"damaged, set aside: {len(aside)} ({', '.join(aside[:5])})")
    line = "running: no"
    if holder := status["holder"]:
        line = (
            f"{'running' if status['running'] else 'lost, or hangs'}: process "
            f"{holder['pid']} on {holder['host']}, since {holder['started']}, last "
            f"sign of life {_duration(holder['seconds_silent'])} ago"
        )
    return "\n  ".join([*lines, line])


def _progress(status: dict[str, Any]) -> str:
    step, steps = status["step"], status["steps"]
    line = f"{status['workdir']}: "
    line += "no step yet" if step is None else f"step {step:,}"
    if steps:
        line += f" of {steps:,} ({(step or 0) / steps:.1%})"
    return line + (", finished" if status["finished"] else "")


def _duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min", "4 d 5 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each")
    arguments = parser.parse_args()
    missing = 0
    for name in arguments.workdirs:
        try:
            status = read_status(name)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            missing += 1
            continue
        print(json.dumps(status) if arguments.json else describe(status))
    return MISTAKE if missing else 0


if __name__ == "__main__":
    run_program(main)
