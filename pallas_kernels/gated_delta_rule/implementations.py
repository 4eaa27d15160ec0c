"""The implementations of the gated delta rule and of its one-token step, in order of preference.

On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl). On Hopper
they come first because they make the whole model faster (benchmarks/results/prefill.jsonl,
train_step.jsonl). With fewer key heads than value heads they refuse, and xla runs.
"""

from pallas_kernels.dispatch import Implementation, Operator
from pallas_kernels.gated_delta_rule import step, xla
from pallas_kernels.gated_delta_rule.api import arguments, step_arguments
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as hopper_rule
from pallas_kernels.gated_delta_rule.hopper import step as hopper_step
from pallas_kernels.gated_delta_rule.partition import (
    partition_gated_delta_rule,
    partition_gated_delta_rule_step,
)
from pallas_kernels.gated_delta_rule.tpu import gated_delta_rule as tpu_rule
from pallas_kernels.hardware import hopper, tpu

GATED_DELTA_RULE = Operator(
    "gated_delta_rule",
    arguments,
    partition_gated_delta_rule,
    (
        Implementation("mosaic_tpu", tpu_rule.gated_delta_rule, tpu, tpu_rule.supports),
        Implementation("mosaic_gpu", hopper_rule.gated_delta_rule, hopper, hopper_rule.supports),
        Implementation("xla", xla.gated_delta_rule),
    ),
)

GATED_DELTA_RULE_STEP = Operator(
    "gated_delta_rule_step",
    step_arguments,
    partition_gated_delta_rule_step,
    (
        Implementation("mosaic_gpu", hopper_step.step, hopper, hopper_step.supports),
        Implementation("xla", step.step),
    ),
)
