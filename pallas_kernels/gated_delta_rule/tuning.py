"""Sizes of the gated delta rule kernels that were chosen by measurement, each with the benchmark
that chose it.

A change is measured with that benchmark again. Sizes that the hardware or the mathematics fixes
stay with their kernel. Hopper: milliseconds on an H100. TPU: static scores. XLA: milliseconds on an
H100, time and memory on a CPU.
"""


class HopperChunks:
    """python -m benchmarks.gated_delta_rule"""

    groups = 3  # warpgroups of a thread block, each with chunks of its own


class HopperSpans:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 16 8 4 2"""

    # chunks of a row that is cut: a kernel more, and the products between spans, take as long as
    # some chunks
    row = 64
    shortest = 16  # chunks of a span
    most = 8  # spans: the products between them go one after the other
    # most chunks of a row in two spans, which won 6 % there; longer rows, and the backward scan,
    # were only timed whole
    two = 128


class HopperSpanTransitions:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 8 4 2"""

    stages = 3  # chunks in shared memory
    registers = 240, 24


class HopperChunkScan:
    """python -m benchmarks.gated_delta_rule"""

    stages, out_stages = (
        2,
        2,
        # chunks in shared memory: of what the carrying warpgroup reads, and of what the one that
        #   puts
        # out reads
    )
    registers = 240, 152, 24


class HopperChunkScanBackward:
    """python -m benchmarks.gated_delta_rule"""

    # Chunks in shared memory: of what one warpgroup reads early, and of what is held longer.
    ahead, stages = (2, 3)
    registers = 240, 24


class HopperGradients:
    """python -m benchmarks.gated_delta_rule"""

    stages = 2  # of everything in shared memory
    registers = 240, 24


class HopperStep:
    """python -m benchmarks.decode"""

    columns = 32  # values of a thread block


class TPU:
    """python -m benchmarks.tpu_scores --op gated_delta_rule"""

    chunk = 128  # an MXU is 128 or 256 wide, and half as many states pass through memory as with 64
    forward, backward = 8, 4  # heads of a block at K 128, V 256 and bfloat16
    base = 16  # rows of a diagonal block that is inverted by substitution


class XLA:
    """python -m benchmarks.gated_delta_rule --implementations xla"""

    chunk = 64
    smallest = 16  # chunk for a handful of tokens
