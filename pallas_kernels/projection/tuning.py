"""Sizes of the projection kernels, each with the benchmark that chooses it.

Sizes fixed by the hardware or the mathematics stay with their kernel.
"""


class Hopper:
    """python -m benchmarks.projection --sweep. Chosen by arithmetic after a sweep with one thread
    block a multiprocessor; with two, not swept yet."""

    rows = 128  # of K in a tile: 16 KiB for each 64 columns; of a gated projection, half of it
    blocks = 1  # of 64 columns in a tile; of a gated projection, as many of gates and of ups
    # Bytes of weights that a thread block has asked for.
    flight = 64 * 1024
    # Bytes of the following matrix that are brought into the L2 cache, at most. A decoded token of
    # the 4.4 B model on an H100: 3.15 ms with 4 MiB, 3.26 with 12, 3.29 with 28.
    ahead = 4 * 1024 * 1024
    # Thread blocks that share a tile's K: as few as give each multiprocessor one.
    splits = 1, 2, 4
    least = 128
