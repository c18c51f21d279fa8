"""python -m tests.proof capture|check [PART ...] [--only REGEX] [--dump DIR]

From the repository's root.

`capture` writes the hash of each case to hashes.json, `check` computes them again,
prints the cases that differ and ends with status 1 if any does. Parts: step, sampler,
order, export, quickstart (minutes). --only: cases whose name it finds. --dump: the
texts that are hashed, to be diffed. PROOF_QUICKSTART=DIR: a finished quickstart.
Programs (StableHLO), order and exports are equal on every machine with the same JAX;
quickstart's numbers only on the same kind of processor.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tests.proof import cases

FILE = Path(__file__).parent / "hashes.json"


def compute(
    parts: list[str], only: str, dump: Path | None
) -> Iterator[tuple[str, str]]:
    """(name of the case, hash of its text or what went wrong)."""
    for part in parts:
        for name, make in cases.PARTS[part]():
            name = f"{part}/{name}"
            if not re.search(only, name):
                continue
            try:
                text = make()
            except Exception as error:
                yield name, f"failed: {type(error).__name__}: {error}"
                continue
            yield name, hashlib.sha256(text.encode()).hexdigest()[:16]
            if dump:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{name.replace('/', '__')}.txt").write_text(text)


def stored() -> dict[str, str]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def capture(found: Iterator[tuple[str, str]]) -> int:
    """Written one by one, for who is interrupted."""
    for name, value in found:
        if value.startswith("failed"):
            print(f"{name}: {value}")
        text = json.dumps(stored() | {name: value}, indent=0, sort_keys=True)
        FILE.write_text(text + "\n")
    return 0


def check(found: Iterator[tuple[str, str]], expected: dict[str, str]) -> int:
    """Prints what differs, and what is gone, at once."""
    left, equal, total = dict(expected), 0, 0
    for name, value in found:
        old, total = left.pop(name, "not captured"), total + 1
        if old == value and not value.startswith("failed"):
            equal += 1
        else:
            print(f"{name}: {old} -> {value}", flush=True)
    for name in left:
        print(f"{name}: gone")
    total += len(left)
    print(f"{equal} of {total} equal")
    return int(equal != total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("capture", "check"))
    parser.add_argument("parts", nargs="*", default=[], metavar="PART")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--dump", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    parts = arguments.parts or list(cases.PARTS)
    found = compute(parts, arguments.only, arguments.dump)
    if arguments.command == "capture":
        return capture(found)
    expected = {
        name: value
        for name, value in stored().items()
        if name.split("/")[0] in parts and re.search(arguments.only, name)
    }
    return check(found, expected)


if __name__ == "__main__":
    sys.exit(main())
