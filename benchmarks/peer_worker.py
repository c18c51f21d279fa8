"""A worker of `benchmarks.peer`: one JSON line in, one JSON line out.

    python -m benchmarks.peer_worker jax|torch

A request is {"do": METHOD, ...}; the answer is what the method of the worker's class
returns, {"error": one line}, or at the start {"lacks": a module's name}. The end of
stdin ends the worker. Runs in interpreters that lack JAX or PyTorch, so it imports
neither.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from sra2_jax.errors import UserError

METHODS = ("facts", "check", "prepare", "run")


def one_line(error: Exception) -> str:
    """What went wrong, short enough to read."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def serve(kind: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until stdin ends."""
    try:
        worker = importlib.import_module(f"benchmarks.peer_{kind}").Worker()
    except ModuleNotFoundError as error:
        say({"lacks": error.name})
        return
    except Exception as error:  # a broken installation raises many kinds
        say({"error": one_line(error)})
        return
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        if name not in METHODS:
            say({"error": f"unknown request {name!r}"})
            continue
        try:
            say(getattr(worker, name)(**request))
        except Exception as error:  # of any layer: the compiler, the device's memory
            say({"error": one_line(error)})


def main() -> None:
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(sys.argv[1], lambda answer: print(json.dumps(answer), file=answers))


if __name__ == "__main__":
    main()
