"""The house keeps its floors: who imports whom, and how large a file may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sra2_jax"
# From the top. A module imports from its own room and from floors below it.
FLOORS = (
    {"__main__", "programs"},
    {"train"},
    {"observe", "hub"},
    {"report", "generator", "log"},
    {"step", "metrics"},
    {"alignment", "data"},
    {"weights"},
    {"checkpoint", "models", "sampler"},
    {"sharding", "transport", "optimizer", "attention", "chips", "tfrecord"},
    {"run"},
    {"command", "runtime"},
    {"config_file"},
    {"config"},
    {"config_align"},
    {"section", "fingerprint", "storage"},
    {"bucket"},
    {"errors", "assets", "__init__"},
)
LARGEST = 350  # lines of a file; models/inception.py is a table


def imports(path):
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            assert not name.startswith(("tools.", "tests.", "benchmarks.", "configs."))
            if name.startswith("sra2_jax."):
                yield module_of(name)


def module_of(name):
    """The path from the package on of the module that has a dotted name."""
    parts = name.split(".")[1:]
    while parts:
        place = PACKAGE.joinpath(*parts)
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return "/".join(parts)
        parts.pop()
    return "__init__"


def graph():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__")
        found[name] = set(imports(path)) - {name}
    return found


def test_imports_run_down():
    floor_of = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"sra2_jax/{name}.py imports {other}: {other.split('/')[0]} is not below"
        for name, others in graph().items()
        for other in sorted(others)
        if name.split("/")[0] != other.split("/")[0]
        and floor_of[name.split("/")[0]] >= floor_of[other.split("/")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from None


def test_no_file_is_too_long():
    lines = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert not [f"{p}: {n}" for p, n in lines.items() if n > LARGEST]
