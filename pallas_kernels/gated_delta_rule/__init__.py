"""Gated delta rule: a linear attention whose state forgets by a gate and corrects itself by the delta rule."""

from pallas_kernels.gated_delta_rule.xla import gated_delta_rule

__all__ = ["gated_delta_rule"]
