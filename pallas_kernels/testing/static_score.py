"""Scores a program for TPU without one: libtpu compiles it on any CPU and tells what the chip would
execute.

    score = sum over programs of max(cycles / clock, bytes / HBM rate)

A program is one Pallas kernel or one of XLA's fusions and copies. A kernel's cycles are its
instruction bundles (one a cycle) times its grid steps, with prologue and epilogue counted in every
step. Its bytes are the blocks that its grid fetches and writes; a block that stays in place counts
once. An XLA program's cycles are the compiler's own estimate. Its bytes are its operands and
results in HBM; of an operand that it only slices or updates, that part. Both are multiplied by the
trips of the loop around it, where the loop counts to a constant. The score is an estimate: it sees
no stalls on memory or DMA, and XLA's own custom calls count by their bytes alone.

A loop inside a kernel counts once: unroll it, or pass it as a grid dimension. Compile in a process
of its own, because the compiler reads its dump flags once. `score` does so for a function that can
be imported.
"""

import dataclasses
import glob
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Chip:
    clock: float  # Hz; assumed, but that the MXUs' peak follows from it on v5e and v6e
    bandwidth: float  # bytes of HBM a second behind one JAX device


CHIPS = {
    "v5e": Chip(1.5e9, 819e9),
    "v5p": Chip(1.75e9, 2765e9),
    "v6e": Chip(1.75e9, 1640e9),
    "tpu7x": Chip(1.75e9, 3690e9),
}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


# JAX (0.10) cannot print a program with gathers that v6e leaves to its sparse cores.
NO_OFFLOAD = "--xla_tpu_offload_gather_to_sparsecore=false"


@dataclasses.dataclass(frozen=True)
class Program:
    """cycles, bytes: of all its trips. bundles, spills (stores of registers to memory): of one
    trip, None for XLA's programs."""

    name: str
    cycles: int
    bytes: int
    trips: int
    bundles: int | None = None
    spills: int | None = None

    def milliseconds(self, chip: str) -> float:
        return 1e3 * max(self.cycles / CHIPS[chip].clock, self.bytes / CHIPS[chip].bandwidth)


@dataclasses.dataclass(frozen=True)
class Score:
    chip: str
    programs: tuple[Program, ...]

    @property
    def milliseconds(self) -> float:
        return sum(program.milliseconds(self.chip) for program in self.programs)

    def kernel(self, name: str) -> Program:
        """The one Pallas kernel of that name."""
        (program,) = (p for p in self.programs if p.bundles is not None and p.name == name)
        return program


def score(build: Callable, chip: str, *places, **names) -> Score:
    """Scores `function` for one device of `chip` ("v5e", "v5p", "v6e", "tpu7x") where `function,
    shapes = build(*places, **names)`.

    `build` is a function of a module (not of __main__). Its arguments are JSON values. The function
    may be jitted, with donated arguments. shapes are jax.ShapeDtypeStruct (or trees of them), one
    for each argument of the function. Raises RuntimeError with the compiler's last words where it
    fails.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {
            "LIBTPU_INIT_ARGS": (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
                # the last pass holds the bundles; the text of all is 500 times as much
                f" --xla_jf_dump_llo_pass_label_regex=final_hlo {NO_OFFLOAD}"
            ),
            "JAX_PLATFORMS": "cpu",
        }
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        work = {
            "module": build.__module__,
            "build": build.__qualname__,
            "chip": chip,
            "places": places,
            "names": names,
            "folder": folder,
        }
        command = [sys.executable, "-m", "pallas_kernels.testing.static_score", json.dumps(work)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        result = Path(folder) / "score.json"
        if not result.exists():
            raise RuntimeError(
                f"{build.__qualname__} does not compile for {chip}: {places}"
                f" {names}\n{done.stderr[-3000:]}"
            )
        programs = json.loads(result.read_text())
    return Score(chip, tuple(Program(**program) for program in programs))


# In the process that compiles.


def _compile_and_read(
    module: str, build: str, chip: str, places: list, names: dict, folder: str
) -> list[Program]:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    function, shapes = getattr(importlib.import_module(module), build)(*places, **names)
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("one",))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):  # tells the kernels' lowering the chip
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        traced = jitted.trace(*shapes)
        hlo = traced.lower().compile().as_text()
    kernels = {}
    for kernel in _kernels(traced.jaxpr.jaxpr):
        if kernels.setdefault((kernel["name"], kernel["results"]), kernel) != kernel:
            raise ValueError(
                f"two kernels are called {kernel['name']} and differ in grid or blocks alone:"
                " rename one"
            )
    return read_hlo(hlo, kernels, folder)


def _kernels(jaxpr):
    """Name, shapes of results, grid steps and bytes of each Pallas call in a jaxpr."""
    import jax

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            traffic = sum(_block_traffic(block, mapping.grid) for block in mapping.block_mappings)
            results = tuple(tuple(x.aval.shape) for x in equation.outvars)
            yield {
                "name": equation.params["name"],
                "results": results,
                "trips": math.prod(mapping.grid),
                "bytes": traffic,
            }
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _kernels(getattr(inner, "jaxpr", inner))


def _block_traffic(block, grid) -> int:
    """Bytes of a block times the number of its changes along the grid. For an array without blocks,
    or with blocks that depend on data, the bytes of the whole array."""
    import jax
    import numpy as np

    array = block.array_aval
    index_map = block.index_map_jaxpr
    if block.has_trivial_window() or len(index_map.in_avals) != len(grid):
        return array.size * array.dtype.itemsize
    steps = np.indices(grid, dtype=np.int32).reshape(len(grid), -1)
    places = jax.vmap(
        lambda *at: jax.numpy.stack(jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *at))
    )(*steps)
    moves = 1 + int(np.any(np.diff(np.asarray(places), axis=0), axis=1).sum())
    return moves * math.prod(block.block_aval.shape) * array.dtype.itemsize


INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+)"
    r" (?P<op>[\w-]+)\((?P<operands>.*?)\)(?P<rest>.*)$"
)
ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
BITS = {"pred": 8, "s4": 4, "u4": 4}
FREE = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "call",
    "conditional",
    "copy-done",
    "slice-done",
}
# What changes a part of its first operand in place: the place of the operand that is written.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def read_hlo(hlo: str, kernels: dict, folder: str) -> list[Program]:
    """The programs of a compiled module, its kernels with the bundles found in `folder`."""
    computations = _computations(hlo)
    found, calls = [], {}
    for instruction in (
        x
        for table in computations.values()
        for x in table.values()
        if "tpu_custom_call" in x["rest"]
    ):
        calls.setdefault(_kernel_key(instruction, kernels), []).append(instruction["name"])

    def visit(name, trips):
        table = computations[name]
        for instruction in table.values():
            rest = instruction["rest"]
            if instruction["op"] == "while":
                bounds = computations[re.search(r"condition=%([\w.<>-]+)", rest)[1]].values()
                bounds = [
                    int(x["operands"])
                    for x in bounds
                    if x["op"] == "constant" and x["type"].startswith("s32")
                ]
                visit(re.search(r"body=%([\w.<>-]+)", rest)[1], trips * max(bounds, default=1))
            elif instruction["op"] == "call":
                visit(re.search(r"to_apply=%([\w.-]+)", rest)[1], trips)
            elif "tpu_custom_call" in rest:
                key = _kernel_key(instruction, kernels)
                found.append(
                    _kernel_program(kernels[key], [instruction["name"], *calls[key]], trips, folder)
                )
            elif instruction["op"] not in FREE:
                cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
                moved = _hbm_bytes(instruction, table, computations)
                if cycles or moved:
                    total = int(cycles[1]) * trips if cycles else 0
                    found.append(Program(instruction["name"], total, moved * trips, trips))

    visit("ENTRY", 1)
    return found


def _kernel_key(instruction, kernels: dict) -> tuple:
    """Name and shapes of results of the kernel that an instruction calls."""
    path = re.search(r'op_name="([^"]*)"', instruction["rest"])[1]
    results = tuple(
        tuple(int(n) for n in found["shape"].split(",") if n)
        for found in ARRAY.finditer(instruction["type"])
    )
    (key,) = (key for key in kernels if re.search(rf"\b{key[0]}\b", path) and key[1] == results)
    return key


def _kernel_program(kernel: dict, names: list[str], trips: int, folder: str) -> Program:
    """names: of the instruction and of those that call the same kernel, because the compiler dumps
    equal programs once."""
    tail = "-[0-9][0-9]-final_hlo-static-per-bundle-utilization.txt"
    file = next(
        file
        for name in names
        for file in glob.glob(f"{glob.escape(folder)}/*-{glob.escape(name)}{tail}")
    )
    head, table = Path(file).read_text().split("== UTILIZATION:")
    columns = [
        column.strip() for column in head.split(":", 1)[1].strip().splitlines()[0].split(",")
    ]
    rows = [line.split() for line in table.splitlines() if re.fullmatch(r"[\d ]+", line)]
    spills = sum(int(row[columns.index("VSTORE:SPILL")]) for row in rows)
    steps = kernel["trips"] * trips
    return Program(
        kernel["name"], len(rows) * steps, kernel["bytes"] * trips, steps, len(rows), spills
    )


def _computations(hlo: str) -> dict[str, dict[str, dict]]:
    """Instructions by computation and name; the entry is called ENTRY."""
    computations, table = {}, {}
    for line in hlo.splitlines():
        if opening := re.match(r"^(ENTRY )?%?([\w.<>-]+) \(.*\{$", line):
            table = computations.setdefault("ENTRY" if opening[1] else opening[2], {})
        elif found := INSTRUCTION.match(line):
            table[found["name"]] = found.groupdict() | {"root": "ROOT" in line[:8]}
    return computations


def _sizes(type_text: str) -> list[int]:
    """Bytes in HBM of each array of a type. 0 for arrays in a chip's own memories."""
    sizes = []
    for found in ARRAY.finditer(type_text):
        bits = BITS.get(found["dtype"]) or int(re.search(r"\d+", found["dtype"])[0])
        count = math.prod(int(n) for n in found["shape"].split(",") if n)
        sizes.append(0 if re.search(r"S\(\d\)", found["layout"] or "") else count * bits // 8)
    return sizes


def _names(instruction) -> list[str]:
    return re.findall(r"%([\w.<>-]+)", instruction["operands"])


def _hbm_bytes(instruction, table, computations) -> int:
    result = sum(_sizes(instruction["type"]))
    operands = [sum(_sizes(table[name]["type"])) for name in _names(instruction)]
    op = instruction["op"]
    if op.endswith(
        "-start"
        # (to, from, flag) or ((from), to, flag): one side in HBM, or what is moved between two
        # places there
    ):
        return max(_sizes(re.sub(r"S\(1\)", "", instruction["type"]))[1:2], default=0)
    if op in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if op in UPDATES:
        return 2 * operands[UPDATES[op]]
    if op == "fusion":
        inside = computations[re.search(r"calls=%([\w.<>-]+)", instruction["rest"])[1]]
        for name, inner in inside.items():
            if inner["op"] == "parameter":
                place = int(inner["operands"])
                operands[place] = min(operands[place], _touched(name, inside, computations))
            if inner["root"] and inner["op"] in UPDATES:
                update = inside[_names(inner)[UPDATES[inner["op"]]]]
                result = min(result, sum(_sizes(update["type"])))
    return result + sum(operands)


def _touched(parameter: str, inside: dict, computations: dict) -> float:
    """Bytes of a fusion's parameter that its instructions read: what slices take, or all of it
    (infinite)."""
    total, names = 0, {parameter}
    for name, inner in inside.items():
        used = [place for place, operand in enumerate(_names(inner)) if operand in names]
        if not used:
            continue
        if inner["op"] == "bitcast" or _is_bitcast(inner, computations):
            names.add(name)
        elif inner["op"] in ("dynamic-slice", "slice", "gather") and used == [0]:
            total += sum(_sizes(inner["type"]))
        elif inner["op"] == "fusion":
            nested = computations[re.search(r"calls=%([\w.<>-]+)", inner["rest"])[1]]
            parameters = {
                int(x["operands"]): x["name"] for x in nested.values() if x["op"] == "parameter"
            }
            total += sum(_touched(parameters[place], nested, computations) for place in used)
        elif not (inner["op"] in UPDATES and used == [0]):
            return math.inf
    return total


def _is_bitcast(instruction: dict, computations: dict) -> bool:
    """Whether it is a fusion that only renames its operand."""
    if instruction["op"] != "fusion":
        return False
    nested = computations[re.search(r"calls=%([\w.<>-]+)", instruction["rest"])[1]]
    return all(x["op"] in ("parameter", "bitcast") for x in nested.values())


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    programs = _compile_and_read(**work)
    Path(work["folder"], "score.json").write_text(
        json.dumps([dataclasses.asdict(program) for program in programs])
    )
