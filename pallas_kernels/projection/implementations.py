"""The implementations of the projection, in order of preference.

`mosaic_gpu` streams each weight once, for 1 to 16 rows. It stands behind `xla` until a benchmark
shows that it is faster.
"""

from pallas_kernels.dispatch import Implementation, Operator
from pallas_kernels.hardware import hopper
from pallas_kernels.projection import xla
from pallas_kernels.projection.api import arguments
from pallas_kernels.projection.hopper import projection as hopper_projection
from pallas_kernels.projection.partition import partition_projection

PROJECTION = Operator("projection", arguments, partition_projection, (
    Implementation("xla", xla.projection),
    Implementation(
        "mosaic_gpu", hopper_projection.projection, hopper, hopper_projection.supports
    ),
))  # fmt: skip
