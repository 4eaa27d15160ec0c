"""Sizes of the short convolution kernels that were chosen by measurement, each with the benchmark
that chose it.

Measure a change with that benchmark again. Sizes fixed by the hardware or the mathematics stay with
their kernel. Hopper: milliseconds on an H100. TPU: static scores. XLA: milliseconds on an H100,
time and memory on a CPU.
"""


class TPU:
    """python -m benchmarks.tpu_scores --op causal_conv"""

    rows, lanes = 512, 512  # tokens and channels of a block
