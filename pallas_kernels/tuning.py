"""The sizes that measurement chose, of all kernels, each with the benchmark that chose it; a change here is measured by it again.

What the hardware or the mathematics fixes stays with its kernel: the rows of a wgmma, the width of a register, a chunk that fills both.
"""

import dataclasses

# --- Hopper: milliseconds on an H100. registers: a thread's, of each kind of warpgroup, the copying one last ---


class HopperAttendForward:
    """python -m benchmarks.attend"""

    keys = 128  # rows of a key block; what rows are padded to is a multiple
    stages = 2  # key and value blocks in shared memory
    registers = 240, 24


class HopperAttendBackward:
    """python -m benchmarks.attend"""

    heads = 2  # query heads that a thread block walks through
    stages = 2  # query blocks in shared memory
    registers = 240, 24


class HopperAttendToken:
    """python -m benchmarks.decode"""

    keys = 128  # slots of a block
    stages = 3  # blocks of keys and of values in shared memory
    blocks = 128  # thread blocks to aim at


class HopperDeltaChunks:
    """python -m benchmarks.gated_delta_rule"""

    groups = 3  # warpgroups of a thread block, each with chunks of its own


class HopperDeltaSpans:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 16 8 4 2"""

    row = 64  # chunks of a row that is cut: a kernel more, and the products between spans, take as long as some chunks
    shortest = 16  # chunks of a span
    most = 8  # spans: the products between them go one after the other
    two = 128  # most chunks of a row in two spans, which won 6 % there; longer rows, and the walk back, were only timed whole


class HopperDeltaPassages:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 8 4 2"""

    stages = 3  # chunks in shared memory
    registers = 240, 24


class HopperDeltaWalk:
    """python -m benchmarks.gated_delta_rule"""

    stages, out_stages = 2, 2  # chunks in shared memory: of what the carrying warpgroup reads, and of what the one that puts out reads
    registers = 240, 152, 24


class HopperDeltaWalkBack:
    """python -m benchmarks.gated_delta_rule"""

    ahead, stages = 2, 3  # chunks in shared memory: of what one warpgroup reads early, and of what is held longer
    registers = 240, 24


class HopperDeltaGradients:
    """python -m benchmarks.gated_delta_rule"""

    stages = 2  # of everything in shared memory
    registers = 240, 24


class HopperDeltaToken:
    """python -m benchmarks.decode"""

    columns = 32  # values of a thread block


# --- TPU: static scores ---


@dataclasses.dataclass(frozen=True)
class Block:
    """What a step of a kernel of attention takes: rows of queries, rows of keys, query heads (at most)."""

    rows: int
    keys: int
    heads: int


class TPUAttend:
    """python -m benchmarks.tpu_scores --op attend"""

    wide = Block(1024, 1024, 8)
    narrow = Block(128, 128, 16)  # for windows up to one register wide
    least = 256  # rows and keys that a narrower window cuts a block down to
    part = 256  # rows whose scores are softened while those of the next are multiplied


class TPUDelta:
    """python -m benchmarks.tpu_scores --op gated_delta_rule"""

    chunk = 128  # an MXU is 128 or 256 wide, and half as many states pass through memory as with 64
    forward, backward = 8, 4  # heads of a block at K 128, V 256 and bfloat16
    base = 16  # rows of a diagonal block that is inverted by substitution


class TPUConv:
    """python -m benchmarks.tpu_scores --op causal_conv"""

    rows, lanes = 512, 512  # tokens and channels of a block


# --- XLA: milliseconds on an H100, time and memory on a CPU ---


class XLAAttend:
    """python -m benchmarks.attend --implementations xla"""

    area = 1 << 20  # scores of one head and one sequence that a step holds at a time
    side = 1024  # most rows of a query block
    band = 256  # windows up to this length are cut into small blocks, many to a step ...
    band_area = 1 << 18  # ... of this many scores


class XLADelta:
    """python -m benchmarks.gated_delta_rule --implementations xla"""

    chunk = 64
    smallest = 16  # chunk for a handful of tokens
