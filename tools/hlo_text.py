"""The text of an optimised HLO module, read into instructions.

`compiled.as_text()` is XLA's own listing of one device's program: computations, one
instruction a line, `%name = type opcode(operands), attributes`. Newer ones have no
get-tuple-element where they can say `%name#2`.
"""

import itertools
import math
import re
from dataclasses import dataclass, field

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Leaf:
    """One array of a type; `space` is 0 for the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Bytes, without a layout's padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype) or (int(digits.group()) if digits else 0)
        return math.prod(self.shape) * bits // 8

    @property
    def moved(self) -> int:
        """Bytes of main memory; a core's own memory costs nothing."""
        return 0 if self.space else self.size


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

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
    def target(self) -> str:
        """Of a custom call, else ""."""
        return self.attribute("custom_call_target").strip('"')

    @property
    def base(self) -> str:
        """The opcode without -start."""
        return self.opcode.removesuffix("-start")


@dataclass
class Computation:
    """The entry, the body of a loop or of a fusion, ..."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.text.split(")")[0]))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry; ValueError without one."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+)[^=]*?\(.*\{\s*$", line):
            current = computations[header.group(2)] = Computation()
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current and (made := _instruction(line)):
            for part in (name for name in made.operands if "#" in name):
                whole, _, place = part.partition("#")
                leaf = current.instructions[whole].leaves[int(place)]
                element = Instruction(part, "get-tuple-element", (leaf,), (whole,), "")
                current.instructions[part] = element
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
    kind, (opcode, bracket, rest) = rest[:cut], rest[cut:].lstrip().partition("(")
    end = _closing(bracket + rest) - 2
    inside = rest[:end]
    # Of a constant or a parameter the brackets hold its value or number.
    literal = opcode in ("constant", "parameter")
    operands = () if literal else tuple(re.findall(r"%([\w.\-#]+)", inside))
    text = rest if literal else rest[end + 1 :]
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
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", kind):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(d) for d in dims.split(",") if d)
        leaves.append(Leaf(dtype, shape, int(space.group(1)) if space else 0))
    return tuple(leaves)


def matmul_flops(made: Instruction, left: Leaf, right: Leaf) -> int:
    """2 x multiply-accumulates of a dot or convolution; places of a convolution's
    window on padding or between dilated elements do not count."""
    out = made.leaves[0].shape
    if made.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.text)
        inner = [int(a) for a in axes.group(1).split(",") if a] if axes else []
        return 2 * math.prod(out) * math.prod(left.shape[a] for a in inner)
    lhs, rhs, result = re.split("_|->", made.attribute("dim_labels"))
    groups = int(made.attribute("batch_group_count") or 1)
    macs = out[result.index("b")] * out[result.index("f")] // groups
    macs *= right.shape[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", made.text)
    given = dict(part.split("=") for part in window.group(1).split()) if window else {}
    for axis in range(len(lhs) - 2):

        def of(name: str, default: int, axis: int = axis) -> int:
            values = given[name].split("x") if name in given else []
            return int(values[axis].split("_")[0]) if values else default

        dilate = of("lhs_dilate", 1)
        last = (left.shape[lhs.index(str(axis))] - 1) * dilate
        outputs = range(out[result.index(str(axis))])
        places = (
            o * of("stride", 1) + k * of("rhs_dilate", 1) - of("pad", 0)
            for o, k in itertools.product(outputs, range(of("size", 1)))
        )
        macs *= sum(0 <= p <= last and p % dilate == 0 for p in places)
    return 2 * macs


def library_flops(made: Instruction, left: Leaf) -> int:
    """2 x multiply-accumulates of a call of cuBLAS, or of cuDNN's flash attention.

    Attention makes two products of (tokens, head size) by tokens for each head and
    image, its backward pass five (it computes the scores again).
    """
    if "fmha" in made.text:
        b, t, h, d = left.shape  # the queries, as jax.nn.dot_product_attention has them
        return (10 if "Backward" in made.text else 4) * b * h * t * t * d
    axes = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', made.text)
    inner = re.findall(r"\d+", axes.group(1)) if axes else []
    return (
        2
        * math.prod(made.leaves[0].shape)
        * math.prod(left.shape[int(axis)] for axis in inner)
    )


def constant_value(where: Computation, name: str) -> int | None:
    """Of a whole constant or a copy of one; None of anything else."""
    made = where.instructions[name]
    if made.opcode == "copy":
        return constant_value(where, made.operands[0])
    return int(made.text.split(")")[0]) if made.opcode == "constant" else None
