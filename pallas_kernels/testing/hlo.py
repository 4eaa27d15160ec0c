"""Work of a compiled TPU program, counted in its text with the trips of its loops.

The compiler's own count (`cost_analysis`) takes the body of a loop once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
# what moves no data of its own: bodies of loops and calls are counted where they run
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
    *("conditional", "after-all", "partition-id", "opt-barrier"),
}


class Work(NamedTuple):
    """What one chip does in a run of a program.

    Attributes:
      flops: of matrix products, a multiply-add as two. Kernels (custom calls) are not among them.
      bytes: that instructions read from the high-bandwidth memory and write to it, kernels too.
      collectives: bytes by kind of collective: its operands or its results, whichever are more.
    """

    flops: float
    bytes: float
    collectives: dict[str, float]


@dataclass
class _Instruction:
    name: str
    result: str
    kind: str
    operands: list[str]
    rest: str
    root: bool


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    def shape(self, name: str) -> str:
        """Result of an instruction; empty if the name is none."""
        return self.instructions[name].result if name in self.instructions else ""

    @property
    def root(self) -> _Instruction:
        return next(each for each in self.instructions.values() if each.root)


def work(hlo: str) -> Work:
    """Work of a program in the compiler's text after its optimisations.

    Raises ValueError if the text has no entry, or a loop without a constant number of trips.
    """
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    flops, moved = 0.0, 0.0
    exchanged: dict[tuple[str, str], float] = {}
    for name, (runs, fused) in times.items():
        own = computations[name]
        for each in own.instructions.values():
            if each.kind == "convolution":
                flops += runs * _product(own, each)
            kind = each.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                # parts of an asynchronous one, in several computations, have the same channel
                channel = re.search(r"channel_id=(\d+)", each.rest)
                key = kind, channel[1] if channel else f"{name} {each.name}"
                size = runs * _exchanged(own, each)
                exchanged[key] = max(size, exchanged.get(key, 0.0))
            if not fused and each.kind not in FREE and not each.kind.endswith("-done"):
                moved += runs * _moved(computations, own, each)
    totals: dict[str, float] = defaultdict(float)
    for (kind, _), size in exchanged.items():
        totals[kind] += size
    return Work(flops, moved, dict(totals))


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the one that a run begins with."""
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in hlo.splitlines():
        if head := re.match(r"^(ENTRY )?%(\S+) \(.*\{$", line):
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            root, name, result, kind, rest = found.groups()
            inside = rest.partition("), ")[0]
            operands = re.findall(r"%([\w.\-]+)", inside)
            current.instructions[name] = _Instruction(
                name, result, kind, operands, rest, bool(root)
            )
    if not entry:
        raise ValueError("this text has no entry computation")
    return computations, entry


def _times(computations: Mapping[str, _Computation], entry: str) -> dict[str, tuple[float, bool]]:
    """How often each computation runs, and whether as part of one instruction (a fusion)."""
    found: dict[str, tuple[float, bool]] = {}

    def visit(name: str, runs: float, fused: bool) -> None:
        before = found.get(name, (0.0, fused))[0]
        found[name] = before + runs, fused
        for each in computations[name].instructions.values():
            called = dict(re.findall(r"\b(calls|body|condition|to_apply)=%([\w.\-]+)", each.rest))
            if each.kind == "while":
                visit(called["body"], runs * _trips(computations[called["condition"]]), fused)
            elif each.kind in ("call", "conditional"):
                for inner in re.findall(r"(?:to_apply|computation)s?=\{?%([\w.\-]+)", each.rest):
                    visit(inner, runs, fused)
            elif "calls" in called:
                visit(called["calls"], runs, True)

    visit(entry, 1.0, False)
    return found


def _trips(condition: _Computation) -> int:
    """Trips of a loop that counts from 0 to a constant."""
    constants = [
        int(number[1])
        for each in condition.instructions.values()
        if each.kind == "constant" and (number := re.match(r"(\d+)\)", each.rest))
    ]
    if condition.root.kind != "compare" or len(constants) != 1:
        raise ValueError("a loop whose number of trips is not a constant cannot be counted")
    return constants[0]


def _arrays(result: str) -> list[tuple[int, list[int], bool]]:
    """Bytes, dimensions and whether it is in the high-bandwidth memory, of each array."""
    out = []
    for dtype, dims, layout in ARRAY.findall(result):
        sizes = [int(size) for size in dims.split(",") if size]
        number = re.search(r"\d+", dtype)
        bits = BITS.get(dtype) or (int(number[0]) if number else 0)
        out.append((math.prod(sizes) * bits // 8, sizes, not re.search(r"S\([1-9]", layout)))
    return out


def _size(result: str, anywhere: bool = True) -> int:
    """Bytes of a result; without `anywhere` of its arrays in the high-bandwidth memory."""
    return sum(size for size, _, far in _arrays(result) if anywhere or far)


def _product(own: _Computation, each: _Instruction) -> float:
    """FLOPs of a matrix product, which is a convolution on a TPU."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", each.rest)
    assert labels, each.rest
    kernel = _arrays(own.shape(each.operands[1]))[0][1]
    summed = math.prod(n for n, label in zip(kernel, labels[1], strict=True) if label != "o")
    return 2.0 * summed * math.prod(_arrays(each.result)[0][1])


def _exchanged(own: _Computation, each: _Instruction) -> int:
    operands = sum(_size(own.shape(name)) for name in each.operands)
    results = _size(each.result)  # a start also returns its operands
    return max(operands, results - operands if each.kind.endswith("-start") else results)


def _moved(
    computations: Mapping[str, _Computation], own: _Computation, each: _Instruction
) -> float:
    """Bytes that an instruction reads and writes. A slice reads itself only, an update in place
    writes the update."""
    called = re.search(r"\bcalls=%([\w.\-]+)", each.rest)
    if each.kind == "fusion" and called and called[1] in computations:
        inner = computations[called[1]]
        parameters = {
            int(number[1]): name
            for name, found in inner.instructions.items()
            if found.kind == "parameter" and (number := re.match(r"(\d+)\)", found.rest))
        }
        read = 0
        for at, name in enumerate(each.operands):
            users = [x for x in inner.instructions.values() if parameters.get(at) in x.operands]
            far = _size(own.shape(name), False)
            read += min(far, sum(_reads(inner, user, parameters[at], far) for user in users))
        return read + _writes(inner, each)
    if each.kind == "dynamic-update-slice":
        return 2.0 * _size(own.shape(each.operands[1]))
    if each.kind in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _size(each.result)
    read = sum(_size(own.shape(name), False) for name in each.operands)
    results = _size(each.result, False)  # a start also returns its operands
    return read + max(0.0, results - read) if each.kind.endswith("-start") else read + results


def _reads(inner: _Computation, user: _Instruction, name: str, whole: int) -> int:
    """Bytes of a parameter of a fusion that one of its instructions reads."""
    if user.kind in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return _size(user.result)
    if user.kind == "dynamic-update-slice" and user.operands[0] == name:
        return 0
    return whole


def _writes(inner: _Computation, each: _Instruction) -> int:
    """Bytes that a fusion writes."""
    root = inner.root
    parts = [inner.instructions[n] for n in root.operands] if root.kind == "tuple" else [root]
    total, arrays = 0, _arrays(each.result)
    if len(parts) != len(arrays):
        return _size(each.result, False)
    for part, (size, _, far) in zip(parts, arrays, strict=True):
        updated = part.kind == "dynamic-update-slice"
        total += far * (_size(inner.shape(part.operands[1])) if updated else size)
    return total
