"""Gated delta rule: linear attention with a state that decays by a gate and is updated by the delta
rule."""

from pallas_kernels.gated_delta_rule.api import (
    RESIDUAL_NAMES,
    gated_delta_rule,
    gated_delta_rule_step,
)
from pallas_kernels.gated_delta_rule.state import DeltaState

__all__ = ["RESIDUAL_NAMES", "DeltaState", "gated_delta_rule", "gated_delta_rule_step"]
