"""The implementations of the short convolution, in order of preference.

On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl). On Hopper the
kernel takes 3.7 ms of a prompt of 8,192 tokens of the 4.4 B model, XLA's fusions 7.5 (by a profile
on an H100; not recorded).
"""

from pallas_kernels.dispatch import Implementation, Operator
from pallas_kernels.hardware import hopper, tpu
from pallas_kernels.short_conv import xla
from pallas_kernels.short_conv.api import arguments
from pallas_kernels.short_conv.hopper import short_conv as hopper_conv
from pallas_kernels.short_conv.partition import partition_short_conv
from pallas_kernels.short_conv.tpu import short_conv as tpu_conv

SHORT_CONV = Operator("short_conv", arguments, partition_short_conv, (
    Implementation("mosaic_tpu", tpu_conv.short_conv, tpu, tpu_conv.supports),
    Implementation(
        "mosaic_gpu", hopper_conv.short_conv, hopper, hopper_conv.supports, lambda **_: "xla"
    ),
    Implementation("xla", xla.short_conv),
))  # fmt: skip
