"""Sizes of the attention kernels that were chosen by measurement, each with the benchmark that
chose it.

Measure a change with that benchmark again. Sizes fixed by the hardware or the mathematics stay with
their kernel. Hopper: milliseconds on an H100. TPU: static scores. XLA: milliseconds on an H100,
time and memory on a CPU.
"""

import dataclasses


class HopperForward:
    """python -m benchmarks.attend"""

    keys = 128  # rows of a key block; what rows are padded to is a multiple
    stages = 2  # key and value blocks in shared memory
    registers = 240, 24
    part = 1024  # least cached keys of a thread block, where queries are few; not measured


class HopperBackward:
    """python -m benchmarks.attend"""

    heads = 2  # query heads that a thread block loops over
    stages = 2  # query blocks in shared memory
    registers = 240, 24


class HopperStep:
    """python -m benchmarks.decode"""

    keys = 128  # slots of a block
    stages = 3  # blocks of keys and of values in shared memory
    blocks = 128  # thread blocks to aim at


@dataclasses.dataclass(frozen=True)
class Block:
    """What a grid step takes: rows of queries, rows of keys, query heads (at most)."""

    rows: int
    keys: int
    heads: int


class TPU:
    """python -m benchmarks.tpu_scores --op attend"""

    wide = Block(1024, 1024, 8)
    narrow = Block(128, 128, 16)  # for windows up to one register wide
    least = 256  # rows and keys that a narrower window cuts a block down to
    part = 256  # rows whose scores are softened while those of the next are multiplied


class XLA:
    """python -m benchmarks.attend --implementations xla"""

    area = 1 << 20  # scores of one head and one sequence that a step holds at a time
    side = 1024  # most rows of a query block
    band = 256  # windows up to this length are cut into small blocks, many to a step ...
    band_area = 1 << 18  # ... of this many scores
