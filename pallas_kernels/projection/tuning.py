"""Sizes of the projection kernels, each with the benchmark that chooses it.

Sizes fixed by the hardware or the mathematics stay with their kernel.
"""

from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS


class Hopper:
    """python -m benchmarks.projection --sweep. Chosen by arithmetic, not measured yet."""

    rows = 128  # of K in a tile: 16 KiB for each 64 columns
    blocks = 1  # of 64 columns in a tile; of a gated projection, as many of gates and of ups
    # Bytes of weights that a multiprocessor has asked for. 24 KiB hide the latency of memory while
    # all multiprocessors take equal parts of the rate. More let the others take the part of those
    # that are done, so that uneven work costs little.
    flight = 160 * 1024
    # Thread blocks that share a tile's K. A tile for each multiprocessor and some more, so that the
    # last ones are not alone with the memory.
    splits = 1, 2, 4
    least = 2 * HOPPER_MULTIPROCESSORS
