"""Checks Hopper machine code: the registers of products must not change while the tensor cores read
them.

    mkdir ptx; export MOSAIC_GPU_DUMP_TO=ptx MOSAIC_GPU_DUMP_PTX=1

    # On a GPU.
    python -m pallas_kernels.testing.matrix --implementation mosaic_gpu

    # With ptxas and nvdisasm of CUDA.
    python -m pallas_kernels.testing.sass ptx/*.ptx

A wgmma (HGMMA) may take its left factor from registers and reads them some time after it is issued.
`overwritten` finds the instructions that write such a register before the wait for the product.
ptxas 13.0 emits them itself: where elements of the factor are known at compile time, it may set the
register of such a constant only between two products that both read it. The first product then
reads the old value.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: str
    opcode: str  # with its modifiers: HGMMA.64x64x16.F32.BF16
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address} {self.opcode} {', '.join(self.operands)}"


class Overwritten(NamedTuple):
    """A register of a product's left factor that is written while the product may still read it."""

    register: str
    product: Instruction
    writer: Instruction

    def __str__(self) -> str:
        return f"{self.register} of «{self.product}» is written by «{self.writer}» before the wait"


_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
# Instructions whose first operand is no register that they write.
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "BSSY",
    "BSYNC",
    "EXIT",
    "SYNCS",
    "UTMA",
    "WARP",
    "MEMBAR",
    "FENCE",
    "CCTL",
    "NANOSLEEP",
)


def disassemble(ptx: Path) -> str:
    """The machine code of a PTX file for sm_90a as nvdisasm prints it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        subprocess.run(
            ["ptxas", "-arch=sm_90a", "-O3", str(ptx), "-o", str(cubin)],
            check=True,
            capture_output=True,
        )
        return subprocess.run(
            ["nvdisasm", "-c", str(cubin)], check=True, capture_output=True, text=True
        ).stdout


def instructions(sass: str) -> list[Instruction]:
    """All instructions of a disassembly, in the order of their addresses."""
    found = (_LINE.match(line) for line in sass.splitlines())
    return [Instruction(m[1], m[2], tuple(x.strip() for x in m[3].split(","))) for m in found if m]


def left_factor(product: Instruction) -> frozenset[int]:
    """The numbers of the four registers of an HGMMA's left factor. Empty if it comes from shared
    memory."""
    match = re.fullmatch(r"R(\d+)(?:\.reuse)?", product.operands[1])
    return frozenset(range(int(match[1]), int(match[1]) + 4)) if match else frozenset()


def written(instruction: Instruction) -> frozenset[int]:
    """Numbers of the registers that an instruction writes."""
    if instruction.opcode.startswith(_NO_RESULT):
        return frozenset()
    match = next((m for x in instruction.operands[:2] if (m := re.fullmatch(r"R(\d+)", x))), None)
    if match is None or (
        instruction.operands[0] != match[0] and not instruction.operands[0].startswith(("P", "UP"))
    ):
        return frozenset()
    modifiers = instruction.opcode.split(".")
    wide = (
        4
        if "128" in modifiers or "4" in modifiers
        else 2
        if {"64", "WIDE", "2"} & set(modifiers)
        else 1
    )
    return frozenset(range(int(match[1]), int(match[1]) + wide))


def overwritten(code: list[Instruction]) -> list[Overwritten]:
    """Registers of left factors that are written before the wait that covers their product, in
    straight-line order."""
    # Products by the group that a wait counts. The last group is still open.
    groups: list[list[Instruction]] = [[]]
    found = []
    for instruction in code:
        if instruction.opcode.startswith("HGMMA"):
            groups[-1].append(instruction)
            if instruction.operands[-1].startswith("gsb"):
                groups.append([])
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            groups = groups[-1 - int(instruction.operands[-1], 16) :]
        else:
            touched = written(instruction)
            for product in (p for group in groups for p in group):
                found += [
                    Overwritten(f"R{n}", product, instruction)
                    for n in sorted(touched & left_factor(product))
                ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ptx", type=Path, nargs="+", help="PTX files, as MOSAIC_GPU_DUMP_PTX=1 leaves them"
    )
    bad = 0
    for path in parser.parse_args().ptx:
        code = instructions(disassemble(path))
        products = [x for x in code if x.opcode.startswith("HGMMA")]
        from_registers = sum(bool(left_factor(p)) for p in products)
        problems = overwritten(code)
        bad += len(problems)
        print(
            f"{path.name}: {len(products)} products, {from_registers} with a register factor,"
            f" {len(problems)} overwritten"
        )
        for problem in problems:
            print(f"  {problem}")
    if bad:
        sys.exit(f"{bad} registers are written while a product may read them")


if __name__ == "__main__":
    main()
