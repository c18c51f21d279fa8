"""Runs in the browser: python -m sra2_jax serve RUNS [--port=8000].

One page for the runs in a folder, also while they train: how each is doing, curves of
several in one plot, their sample grids at the same step, their reports. It writes
nothing and gives out nothing but that; without --host other machines do not reach it.
"""

import json
import os
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from etils import epath

from sra2_jax import report
from sra2_jax.command import Parser
from sra2_jax.errors import UserError, explained
from sra2_jax.programs.status import read_status
from sra2_jax.report.curves import read_series, smooth
from sra2_jax.report.page import TITLES, titles
from sra2_jax.run import Run

POINTS = 500  # of a curve, at most
HTML, JSON, PNG = "text/html; charset=utf-8", "application/json", "image/png"


def inside(path: epath.Path, folder: epath.Path) -> bool:
    """Whether a path, links followed, is below the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def find_runs(folder: epath.Path) -> dict[str, Run]:
    """The runs in a folder and in its folders, or the folder if it is one, by name."""
    if Run(folder).exists():
        return {folder.name: Run(folder)}
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return {
        str(path.relative_to(folder)): Run(path)
        for path in sorted(paths)
        if inside(path, folder) and Run(path).exists()
    }


def describe(run: Run) -> dict[str, Any]:
    """What the page's list says of a run: its status, its grids, its report."""
    grids = [step for step, _ in run.sample_grids()]
    return read_status(run.folder) | {"grids": grids, "report": run.report.exists()}


def read_curves(run: Run) -> list[dict[str, Any]]:
    """Smoothed curves of all metrics, those of `TITLES` first: key, title, steps,
    values."""
    named = TITLES | titles(run.read("config").get("align", {}))
    series = read_series(run.rows())
    curves = []
    for key in [k for k in named if k in series] + sorted(series.keys() - named):
        steps, values = series[key][0], smooth(series[key][1])
        kept = np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).astype(int)
        curve = {"steps": steps[kept].tolist(), "values": values[kept].tolist()}
        curves.append({"key": key, "title": named.get(key, key)} | curve)
    return curves


def page() -> str:
    """The page itself; serve.js asks for the rest and asks again."""
    folder = Path(str(report.__file__)).parent
    html = (folder / "serve.html").read_text()
    for name in ("report.css", "serve.css", "serve.js"):
        html = html.replace(f"${name}", (folder / name).read_text())
    return html


def answer(folder: epath.Path, path: str, query: dict[str, str]) -> tuple[str, bytes]:
    """Type and contents of what is asked for. Raises LookupError, ValueError, OSError:
    there is no such thing."""
    if path == "/":
        return HTML, page().encode()
    runs = find_runs(folder)
    if path == "/runs":
        found: Any = {name: describe(run) for name, run in runs.items()}
        return JSON, json.dumps(found).encode()
    run = runs[query["run"]]
    if path == "/curves":
        return JSON, json.dumps(read_curves(run)).encode()
    step = query.get("step")
    kind, file = (PNG, run.samples(int(step))) if step else (HTML, run.report)
    if path != "/file" or not inside(file, folder):
        raise LookupError(path)
    return kind, file.read_bytes()


def make_server(folder: epath.Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the runs in `folder`; port 0: any that is free.

    Raises UserError: no run is there, or the address is not to be had.
    """
    if not find_runs(folder):
        raise UserError(f"{folder}: no run is there: give a run's folder or their own")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            try:
                kind, body = answer(folder, asked.path, dict(parse_qsl(asked.query)))
            except (LookupError, ValueError, OSError, UserError):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet: the page asks every few seconds."""

    with explained(f"{host}:{port} cannot be listened to", "give another --port"):
        return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="RUNS", help="folder of runs, or of one")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    flags = parser.parse_args()
    server = make_server(epath.Path(flags.folder), flags.host, flags.port)
    print(f"http://{flags.host}:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()
