"""The implementations of the projection, in order of preference.

`mosaic_gpu` streams each weight once, for 1 to 16 rows. A decoded token of the 4.4 B model takes
3.11 ms by it on an H100, a step of eight sequences 3.89 (benchmarks/results/inference.jsonl); 3.67
and 3.97 by `xla` (profiles of the same session, not recorded).
"""

from pallas_kernels.dispatch import Implementation, Operator
from pallas_kernels.hardware import hopper
from pallas_kernels.projection import xla
from pallas_kernels.projection.api import arguments
from pallas_kernels.projection.hopper import projection as hopper_projection
from pallas_kernels.projection.partition import partition_projection

TIMED = 8  # rows, with which a whole model was timed


def slower(x, **_) -> str | None:
    """The reason why `xla` is preferred to the kernel, else None."""
    return None if len(x) <= TIMED else f"{len(x)} rows: not timed beyond {TIMED}"


PROJECTION = Operator("projection", arguments, partition_projection, (
    Implementation(
        "mosaic_gpu", hopper_projection.projection, hopper, hopper_projection.supports,
        slower=slower,
    ),
    Implementation("xla", xla.projection),
))  # fmt: skip
