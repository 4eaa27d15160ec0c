"""The cases that every implementation of an operator runs: the sizes of the published model, and
inputs that such operators have failed on."""

from pallas_kernels.testing.cases.attention import attention_cases
from pallas_kernels.testing.cases.attention_step import attention_step_case, attention_step_cases
from pallas_kernels.testing.cases.gated_delta_rule import gated_delta_rule_cases
from pallas_kernels.testing.cases.gated_delta_rule_step import (
    gated_delta_rule_step_case,
    gated_delta_rule_step_cases,
)
from pallas_kernels.testing.cases.problem import RESULTS, Case, Problem, mesh_shapes
from pallas_kernels.testing.cases.projection import projection_case, projection_cases
from pallas_kernels.testing.cases.short_conv import short_conv_cases

CASES = {
    "attention": attention_cases,
    "gated_delta_rule": gated_delta_rule_cases,
    "attention_step": attention_step_cases,
    "gated_delta_rule_step": gated_delta_rule_step_cases,
    "projection": projection_cases,
    "short_conv": short_conv_cases,
}
"""By operator: its cases of at most so many tokens."""

__all__ = [
    "CASES",
    "RESULTS",
    "Case",
    "Problem",
    "attention_step_case",
    "gated_delta_rule_step_case",
    "mesh_shapes",
    "projection_case",
]
