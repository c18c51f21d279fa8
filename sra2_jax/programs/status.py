"""How runs are doing: python -m sra2_jax status WORKDIR [WORKDIR ...] [--json].

Reads a run's folder, also while the run writes it; neither jax nor TensorFlow.
"""

import json
import math
import os
import socket
import statistics
import sys
import time
from typing import Any

from etils import epath

from sra2_jax.command import Parser, run_program
from sra2_jax.config import read_json
from sra2_jax.errors import MISTAKE, UserError
from sra2_jax.marks import ASIDE, STALE_SECONDS, digest

TAIL = 2**18  # bytes of metrics.jsonl that are read, the last ones: 1,000 rows or so
ROWS = 20  # of which the speed is the median
LARGEST = 2**26  # bytes of a checkpoint's facts


def read_status(workdir: epath.Path) -> dict[str, Any]:
    """What a run's folder says, None for what it does not (yet).

    `step`, `loss`, `skipped` (updates, from step `skipped_since` on) and
    `images_per_second` are of the log; `seconds_left` is without evaluations;
    `checkpoint` is the newest whole one; `set_aside` are damaged ones; `running` says
    whether a process holds the folder and gives signs of life, `holder` which.

    Raises:
      UserError: no run is there.
    """
    parts = ("config.json", "metrics.jsonl", "checkpoints", "lock.json")
    if not any((workdir / part).exists() for part in parts):
        raise UserError(f"{workdir}: no run is there: give the workdir of one")
    config, results = (_object(workdir / f"{n}.json") for n in ("config", "results"))
    rows = _tail(workdir / "metrics.jsonl")
    steps, batch = (_number(config, key) for key in ("steps", "batch_size"))
    checkpoint, set_aside = _checkpoints(workdir / "checkpoints")
    step = max((row["step"] for row in rows), default=None)
    if step is None and checkpoint:
        step = checkpoint["step"]
    speeds = [s for row in rows if (s := _number(row, "images_per_second"))]
    speed = statistics.median(speeds[-ROWS:]) if speeds else None
    left = None
    if steps is not None and batch is not None and speed and step is not None:
        left = max(steps - step, 0) * batch / speed
    return {
        "workdir": str(workdir),
        "name": config.get("name"),
        "step": step,
        "steps": steps,
        "finished": bool(steps and _number(results, "step") == steps),
        "loss": next((x for r in rows[::-1] if (x := _number(r, "loss"))), None),
        "images_per_second": speed,
        "seconds_left": left,
        "seconds_since_row": _age(workdir / "metrics.jsonl") if rows else None,
        "skipped": int(sum(_number(row, "skipped") or 0 for row in rows)),
        "skipped_since": rows[0]["step"] if rows else None,
        "checkpoint": checkpoint,
        "set_aside": set_aside,
        **_holder(_object(workdir / "lock.json")),
    }


def _object(path: epath.Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or it is being written."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(found: Any, key: str) -> Any:
    """A finite number, None for anything else."""
    value = found.get(key) if isinstance(found, dict) else None
    good = type(value) is float and math.isfinite(value)
    return value if good or (type(value) is int and abs(value) < 2**53) else None


def _age(path: epath.Path) -> float | None:
    """Seconds since a file or folder was changed."""
    try:
        return max(time.time() - path.stat().mtime, 0.0)
    except OSError:
        return None


def _tail(path: epath.Path) -> list[dict[str, Any]]:
    """The last whole rows that have a step, oldest first."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines[1 if size > TAIL else 0 :]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn, or being written
            continue
        if _number(row, "step") is not None:
            rows.append(row)
    return rows


def _checkpoints(folder: epath.Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, and the names of those set aside."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return None, []
    newest = None
    for step in sorted((int(n) for n in names if n.isdecimal()), reverse=True):
        if _whole(folder / str(step)):
            newest = {"step": step, "seconds_old": _age(folder / str(step))}
            break
    return newest, sorted(n for n in names if n.startswith(ASIDE))


def _whole(folder: epath.Path) -> bool:
    """Whether its state and fingerprints are there, and these as they were saved. The
    arrays are held against them when a run goes on."""
    if not (folder / "state" / "_METADATA").exists():
        return False
    try:
        facts = read_json(folder / "fingerprint" / "metadata", LARGEST)
        said = facts.pop("sha256")
    except (UserError, AttributeError, KeyError, TypeError):
        return False
    return bool(digest(facts) == said)


def _holder(lock: dict[str, Any]) -> dict[str, Any]:
    """Who has the folder, as lock.json says, and whether it is alive."""
    beat, pid = _number(lock, "beat"), _number(lock, "pid")
    if beat is None or type(pid) is not int:
        return {"running": False, "holder": None}
    silent = max(time.time() - beat, 0.0)
    holder = {key: lock.get(key) for key in ("host", "pid", "started")}
    holder |= {"seconds_silent": silent}
    running = silent < STALE_SECONDS
    if lock.get("host") == socket.gethostname():
        running = running and _alive(pid)
    return {"running": running, "holder": holder}


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
    step, steps = status["step"], status["steps"]
    head = f"{status['workdir']}: no step yet"
    if step is not None:
        head = f"{status['workdir']}: step {step:,}"
    if steps:
        head += f" of {steps:,} ({(step or 0) / steps:.1%})"
    lines = [head + (", finished" if status["finished"] else "")]
    speed, left, loss = (
        status[k] for k in ("images_per_second", "seconds_left", "loss")
    )
    if loss is not None:
        lines.append(f"loss: {loss:.6g}")
    if speed is not None:
        lines.append(f"speed: {speed:,.1f} images/s")
        if left is not None and not status["finished"]:
            lines[-1] += f", {_duration(left)} left without evaluations"
        if (age := status["seconds_since_row"]) is not None:
            lines[-1] += f", logged {_duration(age)} ago"
    if status["skipped"]:
        lines.append(
            f"skipped: {status['skipped']} updates since step "
            f"{status['skipped_since']:,}, see events.jsonl"
        )
    checkpoint, holder = status["checkpoint"], status["holder"]
    lines.append("checkpoint: none")
    if checkpoint:
        old = checkpoint["seconds_old"]
        ago = f", {_duration(old)} ago" if old is not None else ""
        step = f"{checkpoint['step']:,}"
        lines[-1] = f"checkpoint: step {step}{ago}, whole, with its fingerprints"
    if aside := status["set_aside"]:
        lines.append(f"damaged, set aside: {len(aside)} ({', '.join(aside[:5])})")
    lines.append("running: no")
    if holder:
        lines[-1] = "running: " if status["running"] else "lost, or hangs: "
        lines[-1] += (
            f"process {holder['pid']} on {holder['host']}, since {holder['started']}, "
            f"last sign of life {_duration(holder['seconds_silent'])} ago"
        )
    return "\n  ".join(lines)


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
            status = read_status(epath.Path(name))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            missing += 1
            continue
        print(json.dumps(status) if arguments.json else describe(status))
    return MISTAKE if missing else 0


if __name__ == "__main__":
    run_program(main)
