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
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tests.proof import cases

FILE = Path(__file__).parent / "hashes.json"


def compute(parts: list[str], only: str, dump: Path | None) -> dict[str, str]:
    """Name of the case -> hash of its text, or what went wrong."""
    found = {}
    for part in parts:
        for name, make in cases.PARTS[part]():
            name = f"{part}/{name}"
            if not re.search(only, name):
                continue
            try:
                text = make()
            except Exception as error:
                found[name] = f"failed: {type(error).__name__}: {error}"
                continue
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
            if dump:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{name.replace('/', '__')}.txt").write_text(text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("capture", "check"))
    parser.add_argument("parts", nargs="*", default=[], metavar="PART")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--dump", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    parts = arguments.parts or list(cases.PARTS)
    found = compute(parts, arguments.only, arguments.dump)
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    mine = {
        name: value
        for name, value in stored.items()
        if name.split("/")[0] in parts and re.search(arguments.only, name)
    }
    if arguments.command == "capture":
        for name, value in found.items():
            if value.startswith("failed"):
                print(f"{name}: {value}")
        others = {k: v for k, v in stored.items() if k not in mine}
        FILE.write_text(json.dumps(others | found, indent=0, sort_keys=True) + "\n")
        print(f"{len(found)} captured")
        return 0
    names = sorted(mine.keys() | found.keys())
    equal = 0
    for name in names:
        old, new = mine.get(name, "not captured"), found.get(name, "gone")
        equal += old == new and not new.startswith("failed")
        if old != new or new.startswith("failed"):
            print(f"{name}: {old} -> {new}")
    print(f"{equal} of {len(names)} equal")
    return int(equal != len(names))


if __name__ == "__main__":
    sys.exit(main())
