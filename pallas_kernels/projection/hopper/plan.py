"""How the Hopper kernel cuts a projection: tiles, thread blocks, memory."""

from dataclasses import dataclass

from jax import lax

from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS
from pallas_kernels.projection.tuning import Hopper as Tuning

BLOCK = 64  # columns: the rows of a tensor-core product, and 128 bytes of a row of the matrix
GROUP = 8  # rows of x: the columns of a tensor-core product
ROWS = 2 * GROUP  # of x, at most
LEAST = 24 * 1024  # bytes that a multiprocessor has to have asked for, to hide memory's latency
MOST = 256  # rows that one copy (TMA) takes
PIECE = 512  # numbers of a row of x that a warpgroup reads at once
# Bytes of shared memory for the large arrays: of the 227 KiB of a thread block, and of the 113 KiB
# that let two share a multiprocessor. Two hide each other's start and end.
MEMORY, SHARED = 224 * 1024, 110 * 1024
# Clusters that surely have room together, two thread blocks on each multiprocessor. Those of a
# cluster are on multiprocessors of one cluster of the hardware. With one thread block on each
# multiprocessor there is no room for 32 clusters of four.
PLACES = {1: 2 * HOPPER_MULTIPROCESSORS, 2: 128, 4: 60, 8: 28}


@dataclass(frozen=True)
class Plan:
    """Sizes that do not change results beyond rounding. benchmarks/projection.py tries them out.

    rows: of K in a tile. blocks: of 64 columns in a tile (of gates and of ups, as many of each).
    flight: bytes of tiles in flight, at most. splits: thread blocks, a cluster, that share K.
    clusters: at most so many.
    """

    rows: int
    blocks: int
    flight: int
    splits: int
    clusters: int

    def stages(self, rows: int, inputs: int, gated: bool) -> int:
        """Tiles in shared memory, for so many rows of x and K inputs."""
        blocks, groups = self.blocks * (2 if gated else 1), -(-rows // GROUP)
        tile = 2 * self.rows * BLOCK * blocks
        x = 2 * groups * GROUP * inputs // self.splits
        # Sums of all parts, and the result of a tile, in float32.
        sums = 4 * BLOCK * groups * GROUP * (self.splits * blocks + self.blocks)
        shared = SHARED - x - sums
        room = shared if shared >= 2 * LEAST else MEMORY - x - sums
        return min(self.flight, room) // tile

    def refusal(self, rows: int, inputs: int, outputs: int, gated: bool) -> str | None:
        """The reason why the sizes do not fit this plan, else None."""
        if outputs % (BLOCK * self.blocks):
            return f"{outputs} columns: a multiple of {BLOCK * self.blocks}"
        if inputs % (self.rows * self.splits) or inputs < PIECE * self.splits:
            least = max(PIECE, self.rows) * self.splits
            return f"{inputs} inputs: a multiple of {self.rows * self.splits}, at least {least}"
        if self.stages(rows, inputs, gated) < 2:
            return f"{inputs} inputs in {rows} rows: shared memory has no room"
        return None


@dataclass(frozen=True)
class Ahead:
    """What is brought into the L2 cache of the matrix of a following projection: the rows of K that
    its thread blocks begin with, in pieces of `rows` x 64 columns.

    part: inputs that one of its thread blocks multiplies. parts: as many of these. blocks: of 64
    columns, gates and ups counted. pieces: in all.
    """

    rows: int
    part: int
    parts: int
    blocks: int
    pieces: int

    def place(self, piece) -> tuple:
        """First row and block of columns of a piece: first the first rows of all parts."""
        row = lax.div(piece, self.parts * self.blocks) * self.rows
        part = lax.rem(lax.div(piece, self.blocks), self.parts)
        return part * self.part + row, lax.rem(piece, self.blocks)


def ahead(inputs: int, outputs: int, gated: bool, itemsize: int) -> Ahead | None:
    """Of a matrix with these sizes. None: its rows are not what copies take."""
    if outputs % BLOCK:
        return None
    plan = choose(inputs, outputs, gated)
    parts = 1 if isinstance(plan, str) else plan.splits
    rows, part, blocks = min(MOST, inputs // parts), inputs // parts, outputs // BLOCK
    blocks *= 2 if gated else 1
    most = Tuning.ahead // (rows * BLOCK * itemsize)
    return Ahead(rows, part, parts, blocks, min(most, part // rows * parts * blocks))


def choose(inputs: int, outputs: int, gated: bool) -> Plan | str:
    """The plan for these sizes, or the reason why there is none.

    Its tiles and splits depend on the matrix alone, so that a row's result does not depend on the
    number of rows.
    """
    found = None
    for splits in Tuning.splits:
        for tile_rows in (BLOCK,) if gated else (Tuning.rows, BLOCK):
            plan = Plan(tile_rows, Tuning.blocks, Tuning.flight, splits, PLACES[splits])
            # 16 rows decide, whatever the number of rows.
            if plan.refusal(ROWS, inputs, outputs, gated) is None:
                found = plan
                break
        if found and outputs // (BLOCK * found.blocks) * found.splits >= Tuning.least:
            break
    if found:
        return found
    least = Plan(BLOCK, Tuning.blocks, Tuning.flight, 1, PLACES[1])
    return least.refusal(ROWS, inputs, outputs, gated)
