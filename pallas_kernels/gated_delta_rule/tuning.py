"""Sizes of the gated delta rule kernels that were chosen by measurement, each with the benchmark
that chose it.

Measure a change with that benchmark again. Sizes fixed by the hardware or the mathematics stay with
their kernel. Hopper: milliseconds on an H100. TPU: static scores. XLA: milliseconds on an H100,
time and memory on a CPU.
"""


class HopperChunks:
    """python -m benchmarks.gated_delta_rule"""

    groups = 3  # warpgroups of a thread block, each with its own chunks


class HopperSpans:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 16 8 4 2"""

    # Chunks of the shortest row that is cut. One more kernel and the products between spans take
    # as long as some chunks.
    row = 64
    shortest = 16  # chunks of a span
    most = 8  # spans: the products between them are sequential
    # Chunks of the longest row in two spans, which are 6 % faster there. Longer rows, and the
    # backward scan, were only timed whole.
    two = 128


class HopperSpanTransitions:
    """python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 8 4 2"""

    stages = 3  # chunks in shared memory
    registers = 240, 24


class HopperChunkScan:
    """python -m benchmarks.gated_delta_rule"""

    stages = 2  # chunks in shared memory, for the warpgroup that carries the state
    out_stages = 2  # likewise, for the warpgroup that writes outputs
    registers = 240, 152, 24


class HopperChunkScanBackward:
    """python -m benchmarks.gated_delta_rule"""

    ahead = 2  # chunks in shared memory, of inputs that one warpgroup reads early
    stages = 3  # likewise, of inputs that are held longer
    registers = 240, 24


class HopperGradients:
    """python -m benchmarks.gated_delta_rule"""

    stages = 2  # places in shared memory
    registers = 240, 24


class HopperStep:
    """python -m benchmarks.decode"""

    columns = 32  # values of a thread block


class TPU:
    """python -m benchmarks.tpu_scores --op gated_delta_rule"""

    chunk = 128  # an MXU is 128 or 256 wide; 64 would move twice as many states
    forward, backward = 8, 4  # heads of a block at K 128, V 256 and bfloat16
    base = 16  # rows of a diagonal block that is inverted by substitution


class XLA:
    """python -m benchmarks.gated_delta_rule --implementations xla"""

    chunk = 64
    smallest = 16  # chunk for a handful of tokens
