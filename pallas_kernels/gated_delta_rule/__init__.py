"""Gated delta rule: a linear attention whose state forgets by a gate and corrects itself by the delta rule."""

from pallas_kernels.gated_delta_rule.xla import gated_delta_rule

# names, in every implementation, of the result and of what the backward pass keeps besides the inputs: for policies of rematerialisation
KEPT = ("gdn_out", "gdn_inverse", "gdn_states")

__all__ = ["KEPT", "gated_delta_rule"]
