"""Run configuration: mesh, precision, rematerialisation, operator implementations."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from msgspec import Meta

from infinitevl_jax.config.ranges import Name, check_ranges
from infinitevl_jax.errors import InfiniteVLError

AXES = ("data", "fsdp", "tensor", "context")
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
REMATS = get_args(Remat)
Parts = Annotated[int, Meta(ge=-1, le=2**20)]


@dataclass(frozen=True)
class OpsConfig:
    """Implementation of each operator: "mosaic_gpu", "mosaic_tpu", "xla".

    "mosaic_gpu,xla" is a list in order of preference. None uses the first that is supported.
    """

    attention: Name | None = None
    gated_delta_rule: Name | None = None
    short_conv: Name | None = None
    attention_step: Name | None = None
    gated_delta_rule_step: Name | None = None
    projection: Name | None = None

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class RunConfig:
    """Mesh sizes and numerics. At most one mesh axis may be -1, which takes all remaining devices.

    Attributes:
      data: replicas of the model.
      fsdp: shards of the batch and of the parameters.
      tensor: shards of heads and hidden units.
      context: shards of the sequence; reserved, must be 1.
      dtype: activation dtype. Trained parameters are always float32.
      remat: what the backward pass recomputes. "none" saves all activations, "dots" saves matrix
        products and the operators' residuals, "full" saves layer inputs only.
      scan: scan identical layers (compile time independent of depth) or unroll them (no copies into
        and out of stacked parameters on a GPU).
      ops: operator implementations.
    """

    data: Parts = 1
    fsdp: Parts = -1
    tensor: Parts = 1
    context: Parts = 1
    dtype: Dtype = "float32"
    remat: Remat = "none"
    scan: bool = True
    ops: OpsConfig = field(default_factory=OpsConfig)

    def __post_init__(self):
        check_ranges(self)
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if bad := [axis for axis, size in sizes.items() if size < 1 and size != -1]:
            raise InfiniteVLError(
                f"run.{bad[0]} is {sizes[bad[0]]}",
                "a mesh axis has 1 or more parts, or -1 for all devices left over",
            )
        if list(sizes.values()).count(-1) > 1:
            raise InfiniteVLError(
                f"the mesh {sizes} has more than one axis of -1", "give -1 to one axis only"
            )
        if self.context != 1:
            raise InfiniteVLError(
                f"run.context is {self.context}", "the context axis is reserved: leave it at 1"
            )
