"""How a run is carried out: mesh, precision, rematerialisation. None of it changes what is
computed, only where and how exactly."""

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
    """The implementation of each operator that must run ("mosaic_gpu", "mosaic_tpu", "xla"), or
    several in order ("mosaic_gpu,xla"). None: the first that can run.
    """

    attention: Name | None = None
    gated_delta_rule: Name | None = None
    short_conv: Name | None = None
    attention_step: Name | None = None
    gated_delta_rule_step: Name | None = None

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class RunConfig:
    """Sizes of the mesh axes, and the numerics.

    data: copies of the model. fsdp: parts that batch and parameters are cut into. tensor: parts
      that heads and hidden units are cut into.
    context: parts that the length is cut into; reserved, 1 for now. One of them may be -1: all
      devices that the others leave.
    dtype: what activations are computed in (parameters that train are float32 always).
    remat: what each layer keeps for the backward pass: "none" of it is recomputed, all but matrix
      products
    and what the mixers' operators return ("dots"), or "full".
    scan: whether equal layers are one loop, which compiles in a time that does not follow the
      depth, or each stands by itself, which
    spares a GPU the copies into and out of the stacks.
    ops: the implementations that are allowed of each operator.
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
                f"the mesh {sizes} leaves more than one axis open", "give -1 to one axis only"
            )
        if self.context != 1:
            raise InfiniteVLError(
                f"run.context is {self.context}", "the context axis is reserved: leave it at 1"
            )
