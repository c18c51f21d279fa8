"""What a compiled program does, read from the text of its optimised HLO.

Matrix products, bytes and collectives of one device are counted over the whole step:
what a loop's body does counts once a turn. XLA's `cost_analysis` counts a loop once, so
it cannot serve.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.hlo_text import (
    Computation,
    Instruction,
    Leaf,
    constant_value,
    library_flops,
    matmul_flops,
    parse,
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
MATMULS = ("dot", "convolution")
# The same as calls of a GPU's libraries.
LIBRARY_PRODUCTS = ("__cublas$", "__cudnn$fmha")
# Kinds of traffic, in the order of a report.
TRAFFIC = ("matmul", "elementwise", "copy", "custom", "collective")
# Names, not work: they move no bytes.
FREE = (
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
)
SLICES = ("dynamic-slice", "slice", "gather")
# Custom calls that only reserve memory or state a fact.
NO_WORK = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
# jax.nn.dot_product_attention names its two products after their axes, queries T and
# keys S; on a GPU the kernel's name says it.
ATTENTION = re.compile(r"BTNH,BSNH|BNTS,BSNH|fmha")


@dataclass
class Counts:
    """One device's share of one run of the program."""

    matmuls: int = 0  # matrix products and convolutions
    attention_matmuls: int = 0  # those of them that attention makes
    # FLOPs (2 x multiply-accumulates) and bytes of an instruction with a product, runs
    products: list[tuple[int, int, int]] = field(default_factory=list)
    custom_calls: Counter[str] = field(default_factory=Counter)  # target -> runs
    traffic: Counter[str] = field(default_factory=Counter)  # kind -> bytes, see TRAFFIC
    # (kind, dtype) -> runs and bytes of the larger side, operands or results
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    collective_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unknown_loops: list[str] = field(default_factory=list)  # counted as one turn

    @property
    def matmul_flops(self) -> int:
        """Of all matrix products, those of rematerialisation included."""
        return sum(flops * runs for flops, _, runs in self.products)


def count(text: str) -> Counts:
    """Counts of an optimised module's text; ValueError if it is none."""
    computations, entry = parse(text)
    counter = _Counter(computations)
    counter.walk(computations[entry], 1)
    return counter.counts


class _Counter:
    """Walks a module from its entry, with how often each computation runs."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations, self.counts = computations, Counts()
        self.channels: set[str] = set()  # of the collectives counted

    def walk(self, where: Computation, times: int) -> None:
        for made in where.instructions.values():
            if made.opcode == "while":
                self.walk(self._called(made, "body"), times * self._turns(where, made))
            elif made.opcode in ("call", "async-start"):
                name = "to_apply" if made.attribute("to_apply") else "calls"
                self.walk(self._called(made, name), times)
            elif made.opcode == "conditional":
                # Which branch runs is not known: all count.
                for name in re.findall(r"%([\w.\-]+)", made.text.split("metadata")[0]):
                    self.walk(self.computations[name], times)
            else:
                self._one(where, made, times)

    def _called(self, made: Instruction, name: str) -> Computation:
        return self.computations[made.attribute(name)]

    def _turns(self, where: Computation, loop: Instruction) -> int:
        stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        turns = int(stated.group(1)) if stated else self._range(where, loop)
        if not turns:
            self.counts.unknown_loops.append(loop.name)
        return turns or 1

    def _range(self, where: Computation, loop: Instruction) -> int:
        """Turns of a loop over range(start, end, step); 0 if it is none."""
        body, condition = self._called(loop, "body"), self._called(loop, "condition")
        test = condition.instructions[condition.root]
        if test.attribute("direction") != "LT":
            return 0
        place = int(condition.instructions[test.operands[0]].attribute("index"))
        update = body.instructions[body.instructions[body.root].operands[place]]
        start = where.instructions[loop.operands[0]].operands[place]
        first = constant_value(where, start)
        end = constant_value(condition, test.operands[1])
        step = None
        if update.opcode == "add":
            step = constant_value(body, update.operands[1])
        if first is None or end is None or step is None:
            return 0
        return len(range(first, end, step))

    def _one(self, where: Computation, made: Instruction, times: int) -> None:
        """One instruction of the schedule: an operation, or a fusion of several."""
        idle = made.opcode in FREE or made.opcode.endswith("-done")
        if idle or made.target in NO_WORK:
            return
        inside = [(where, made)]
        if made.opcode == "fusion":  # of a library's call, too, with a slice before it
            inside = list(self._fused(self._called(made, "calls")))
        library = any(i.target.startswith(LIBRARY_PRODUCTS) for _, i in inside)
        products = (*MATMULS, "custom-call") if library else MATMULS
        matmuls = [part for part in inside if part[1].opcode in products]
        targets = [i.target for _, i in inside if i.target]
        collectives = [part for part in inside if part[1].base in COLLECTIVES]
        for part in collectives:
            self._collective(*part, times)
        for target in targets:
            self.counts.custom_calls[target] += times
        kind = "matmul" if matmuls else "custom" if targets else "elementwise"
        kind = "copy" if made.base in ("copy", "slice") else kind
        if collectives:  # the fusion's own type holds the collective's buffers, too
            moved = sum(self._sides(*part) for part in matmuls)
        else:
            moved = self._moved(where, made)
        if library:  # not the library's own space, bytes
            moved -= sum(x.moved for x in made.leaves if x.dtype in ("s8", "u8"))
        self.counts.traffic[kind] += times * moved
        if matmuls:
            flops = sum(self._matmul(*part, times) for part in matmuls)
            self.counts.products.append((flops, moved, times))

    def _fused(self, where: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for made in where.instructions.values():
            if made.opcode == "fusion":
                yield from self._fused(self._called(made, "calls"))
            else:
                yield where, made

    def _matmul(self, where: Computation, made: Instruction, times: int) -> int:
        self.counts.matmuls += times
        self.counts.attention_matmuls += times * bool(ATTENTION.search(made.text))
        left, right = (where.instructions[o].leaves[0] for o in made.operands[:2])
        if made.opcode == "custom-call":
            return library_flops(made, left)
        return matmul_flops(made, left, right)

    def _collective(self, where: Computation, made: Instruction, times: int) -> None:
        # A TPU's program spreads one collective over several fusions.
        channel = made.attribute("channel_id") or made.name
        if channel in self.channels:
            return
        self.channels.add(channel)
        operands, results = Counter[str](), Counter[str]()
        for leaf in (x for o in made.operands for x in where.instructions[o].leaves):
            operands[leaf.dtype] += leaf.size
        for leaf in made.leaves:
            results[leaf.dtype] += leaf.size
        if made.opcode in ("all-gather-start", "collective-permute-start"):
            results -= operands  # these give their operands back, too
        for dtype in operands:
            key = made.base, dtype
            self.counts.collectives[key] += times
            larger = max(operands[dtype], results[dtype])
            self.counts.collective_bytes[key] += times * larger
        self.counts.traffic["collective"] += times * self._sides(where, made)

    def _sides(self, where: Computation, made: Instruction) -> int:
        """Bytes of the operands and results."""
        sources = (where.instructions[name] for name in made.operands)
        return sum(leaf.moved for s in (made, *sources) for leaf in s.leaves)

    def _moved(self, where: Computation, made: Instruction) -> int:
        """Bytes read and written; of a slice only what is cut out or written over."""
        sources = [where.instructions[name] for name in made.operands]
        if made.opcode == "fusion":
            called = self._called(made, "calls")
            total = self._written(called, called.root, made.leaves)
            for source, parameter in zip(sources, called.parameters(), strict=True):
                total += min(source.leaves[0].moved, self._read(called, parameter))
            return total
        if made.opcode == "slice-start":  # its type: source, result, a flag
            whole, part = made.leaves[:2]
            return part.moved + (0 if whole.space else part.size)
        if made.opcode == "dynamic-update-slice":
            return 2 * sources[1].leaves[0].moved
        if made.opcode in SLICES:
            return 2 * made.leaves[0].moved
        if made.opcode.endswith("-start"):  # the type names both sides
            return sum(leaf.moved for leaf in made.leaves)
        return self._sides(where, made)

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
                total += sum(self._read(called, called.parameters()[i]) for i in places)
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
