"""What a compiled program does, read from the text of its optimised HLO.

`compiled.as_text()` is XLA's own listing of one device's program. Matrix products,
bytes and collectives are counted over the whole step: what a loop's body does counts
once a turn. XLA's `cost_analysis` counts a loop once, so it cannot serve.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
MATMULS = ("dot", "convolution")
# Kinds of traffic, in the order of a report.
TRAFFIC = ("matmul", "elementwise", "copy", "custom", "collective")
# Names, not work: they move no bytes.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "async-update",
}
SLICES = ("dynamic-slice", "slice", "gather")
# Targets that only reserve memory or state a fact.
NO_WORK = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
# jax.nn.dot_product_attention names its two products after their axes, queries T and
# keys S; on a GPU the kernel's name says it.
ATTENTION = re.compile(r"BTNH,BSNH|BNTS,BSNH|fmha")


@dataclass(frozen=True)
class Leaf:
    """One array of a type; `space` is 0 for the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Bytes, padding of the layout not counted."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype) or (int(digits.group()) if digits else 0)
        return math.prod(self.shape) * bits // 8

    @property
    def moved(self) -> int:
        """Bytes of main memory; a core's own memory costs nothing."""
        return 0 if self.space else self.size


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    text: str  # what follows the operands, and of a constant its value

    def attribute(self, name: str) -> str:
        """The value of name=VALUE up to a comma; "" where it has none."""
        found = re.search(rf"\b{name}=([^, ]+)", self.text)
        return found.group(1).lstrip("%") if found else ""

    @property
    def base(self) -> str:
        """The opcode without -start."""
        return self.opcode.removesuffix("-start")


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def parameters(self) -> dict[int, Instruction]:
        return {
            int(i.text.split(")")[0]): i
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }


@dataclass
class Counts:
    """One device's share of one run of the program."""

    matmuls: int = 0  # matrix products and convolutions
    attention_matmuls: int = 0  # those of them that attention makes
    matmul_flops: float = 0.0  # 2 x multiply-accumulates, those done twice included
    custom_calls: Counter[str] = field(default_factory=Counter)  # target -> runs
    traffic: Counter[str] = field(default_factory=Counter)  # kind -> bytes, see TRAFFIC
    # (kind, dtype) -> runs and bytes of the larger side, operands or results
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    collective_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    loops: dict[str, int] = field(default_factory=dict)  # loop -> turns
    unknown_loops: list[str] = field(default_factory=list)  # counted as one turn

    @property
    def bytes_moved(self) -> int:
        """Read from and written to main memory."""
        return sum(self.traffic.values())


def count(text: str) -> Counts:
    """Counts of an optimised module's text.

    Raises:
      ValueError: the text has no entry computation.
    """
    return _Counter(*parse(text)).run()


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+)[^=]*?\(.*\{\s*$", line):
            current = computations[header.group(2)] = Computation()
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current and (made := _instruction(line)):
            current.instructions[made.name] = made
            if line.lstrip().startswith("ROOT"):
                current.root = made.name
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    cut = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:cut], rest[cut:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    inside = rest[1 : end - 1]
    # Of a constant or a parameter the brackets hold its value or number.
    literal = opcode in ("constant", "parameter")
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    text = inside + rest[end - 1 :] if literal else rest[end:]
    return Instruction(found.group(1), opcode, _leaves(kind), operands, text)


def _closing(text: str) -> int:
    """Length of the bracketed text at the start."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"not a line of HLO: {text[:80]}")


def _leaves(kind: str) -> tuple[Leaf, ...]:
    leaves = []
    for dtype, dims, layout in re.findall(
        r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", kind
    ):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        leaves.append(Leaf(dtype, shape, int(space.group(1)) if space else 0))
    return tuple(leaves)


def dot_flops(made: Instruction, left: Leaf, right: Leaf) -> int:
    """2 x multiply-accumulates of a dot or convolution; positions of a convolution's
    window that fall on padding or between dilated elements do not count."""
    out = made.leaves[0]
    if made.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.text)
        axis = [int(a) for a in axes.group(1).split(",") if a] if axes else []
        return 2 * math.prod(out.shape) * math.prod(left.shape[a] for a in axis)
    lhs, rhs, result = re.split("_|->", made.attribute("dim_labels"))
    groups = int(made.attribute("batch_group_count") or 1)
    macs = out.shape[result.index("b")] * out.shape[result.index("f")] // groups
    macs *= right.shape[rhs.index("i")]
    for axis, options in enumerate(_window(made.text, len(lhs) - 2)):
        label = str(axis)
        macs *= _valid(
            left.shape[lhs.index(label)], out.shape[result.index(label)], **options
        )
    return 2 * macs


def _window(text: str, axes: int) -> list[dict[str, int]]:
    """Size, stride, lower padding and dilations of each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", text)
    given = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def values(name: str, default: str) -> list[int]:
        parts = given[name].split("x") if name in given else [default] * axes
        return [int(part.split("_")[0]) for part in parts]

    names = {"size": "1", "stride": "1", "pad": "0", "lhs_dilate": "1"}
    names["rhs_dilate"] = "1"
    columns = {name: values(name, default) for name, default in names.items()}
    return [{name: columns[name][a] for name in names} for a in range(axes)]


def _valid(
    inputs: int,
    outputs: int,
    *,
    size: int,
    stride: int,
    pad: int,
    lhs_dilate: int,
    rhs_dilate: int,
) -> int:
    """Pairs (output, place in the window) that fall on an element of the input."""
    last = (inputs - 1) * lhs_dilate
    places = (
        o * stride + k * rhs_dilate - pad
        for o, k in itertools.product(range(outputs), range(size))
    )
    return sum(0 <= p <= last and p % lhs_dilate == 0 for p in places)


class _Counter:
    """Walks a module from its entry."""

    def __init__(self, computations: dict[str, Computation], entry: str):
        self.computations, self.entry, self.counts = computations, entry, Counts()

    def run(self) -> Counts:
        self._walk(self.computations[self.entry], 1)
        return self.counts

    def _walk(self, where: Computation, times: int) -> None:
        for made in where.instructions.values():
            if made.opcode == "while":
                self._walk(self._called(made, "body"), times * self._turns(made))
            elif made.opcode in ("call", "async-start"):
                name = "to_apply" if made.attribute("to_apply") else "calls"
                self._walk(self._called(made, name), times)
            elif made.opcode == "conditional":
                # Which branch runs is not known: all count.
                for name in re.findall(r"%([\w.\-]+)", made.text.split("metadata")[0]):
                    self._walk(self.computations[name], times)
            else:
                self._one(where, made, times)

    def _called(self, made: Instruction, name: str) -> Computation:
        return self.computations[made.attribute(name)]

    def _turns(self, loop: Instruction) -> int:
        """As the loop's text states, or the bound of a condition i < n from 0 on."""
        stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        turns = int(stated.group(1)) if stated else self._bound(loop)
        if turns:
            self.counts.loops[loop.name] = turns
        else:
            self.counts.unknown_loops.append(loop.name)
        return turns or 1

    def _bound(self, loop: Instruction) -> int:
        condition = self._called(loop, "condition")
        root = condition.instructions[condition.root]
        if root.opcode == "compare" and root.attribute("direction") == "LT":
            bound = condition.instructions[root.operands[1]]
            if bound.opcode == "constant":
                return int(bound.text.split(")")[0])
        return 0

    def _one(self, where: Computation, made: Instruction, times: int) -> None:
        """One instruction of the schedule: an operation, or a fusion of several."""
        if made.opcode in FREE or made.opcode.endswith("-done"):
            return
        target = made.attribute("custom_call_target").strip('"')
        if target in NO_WORK:
            return
        kind, inside = "elementwise", [(where, made)]
        if made.opcode == "fusion":
            inside = list(self._fused(self._called(made, "calls")))
        for place, part in inside:
            if part.opcode in MATMULS:
                kind = "matmul"
                self._matmul(place, part, times)
            elif part.base in COLLECTIVES:
                kind = "collective"
                self._collective(place, part, times)
        if target:
            kind = "custom"
            self.counts.custom_calls[target] += times
        elif made.base == "copy":
            kind = "copy"
        self.counts.traffic[kind] += times * self._moved(where, made)

    def _fused(self, where: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for made in where.instructions.values():
            if made.opcode == "fusion":
                yield from self._fused(self._called(made, "calls"))
            else:
                yield where, made

    def _matmul(self, where: Computation, made: Instruction, times: int) -> None:
        left, right = (where.instructions[o].leaves[0] for o in made.operands[:2])
        self.counts.matmuls += times
        self.counts.matmul_flops += times * dot_flops(made, left, right)
        if ATTENTION.search(made.text):
            self.counts.attention_matmuls += times

    def _collective(self, where: Computation, made: Instruction, times: int) -> None:
        operands: Counter[str] = Counter()
        for name in made.operands:
            for leaf in where.instructions[name].leaves:
                operands[leaf.dtype] += leaf.size
        results: Counter[str] = Counter()
        for leaf in made.leaves:
            results[leaf.dtype] += leaf.size
        if made.opcode in ("all-gather-start", "collective-permute-start"):
            results -= operands  # these give their operands back, too
        for dtype in operands:
            key = made.base, dtype
            self.counts.collectives[key] += times
            larger = max(operands[dtype], results[dtype])
            self.counts.collective_bytes[key] += times * larger

    def _moved(self, where: Computation, made: Instruction) -> int:
        """Bytes read and written; of a slice only what is cut out or written over."""
        sources = [where.instructions[name] for name in made.operands]
        if made.opcode == "fusion":
            called = self._called(made, "calls")
            inner = called.parameters()
            read = sum(
                min(source.leaves[0].moved, self._read(called, inner[i]))
                for i, source in enumerate(sources)
                if source.leaves
            )
            return read + self._written(called, called.root, made.leaves)
        if made.opcode.endswith("-start"):  # the type names both sides
            return sum(leaf.moved for leaf in made.leaves)
        written = sum(leaf.moved for leaf in made.leaves)
        if made.opcode in SLICES:
            return 2 * written
        if made.opcode == "dynamic-update-slice":
            return 2 * sources[1].leaves[0].moved
        return written + sum(leaf.moved for s in sources for leaf in s.leaves)

    def _read(self, where: Computation, value: Instruction) -> int:
        """Bytes of `value` that the instructions of a fusion use."""
        total, whole = 0, value.leaves[0].size
        for user in where.instructions.values():
            places = [i for i, name in enumerate(user.operands) if name == value.name]
            if not places:
                continue
            if user.opcode in SLICES and places == [0]:
                total += user.leaves[0].size
            elif user.opcode == "bitcast":
                total += self._read(where, user)
            elif user.opcode == "fusion":
                called = self._called(user, "calls")
                inner = called.parameters()
                total += sum(self._read(called, inner[i]) for i in places)
            elif user.opcode != "dynamic-update-slice" or places != [0]:
                return whole
        return min(total, whole)

    def _written(self, where: Computation, name: str, leaves: tuple[Leaf, ...]) -> int:
        made = where.instructions[name]
        if made.opcode == "tuple" and len(made.operands) == len(leaves):
            pairs = zip(made.operands, leaves, strict=True)
            return sum(self._written(where, o, (leaf,)) for o, leaf in pairs)
        if made.opcode == "bitcast":
            return self._written(where, made.operands[0], leaves)
        if made.opcode == "fusion":
            called = self._called(made, "calls")
            return self._written(called, called.root, leaves)
        if made.opcode == "dynamic-update-slice" and not leaves[0].space:
            return where.instructions[made.operands[1]].leaves[0].size
        return sum(leaf.moved for leaf in leaves)
