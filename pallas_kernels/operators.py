"""All operators, each with what is registered for it."""

from pallas_kernels.attention.implementations import ATTENTION, ATTENTION_STEP
from pallas_kernels.dispatch import Operator
from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE, GATED_DELTA_RULE_STEP
from pallas_kernels.l2norm.implementations import L2NORM
from pallas_kernels.projection.implementations import PROJECTION
from pallas_kernels.short_conv.implementations import SHORT_CONV

OPERATORS: tuple[Operator, ...] = (
    ATTENTION, GATED_DELTA_RULE, SHORT_CONV, L2NORM, ATTENTION_STEP, GATED_DELTA_RULE_STEP,
    PROJECTION,
)  # fmt: skip
