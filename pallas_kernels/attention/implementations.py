"""The implementations of attention and of its one-token step, in order of preference.

On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl). On Hopper
they come first because they make the whole model faster (benchmarks/results/prefill.jsonl,
train_step.jsonl). They refuse heads wider than 128, and xla runs.
"""

from pallas_kernels.attention import step, xla
from pallas_kernels.attention.api import arguments, step_arguments
from pallas_kernels.attention.hopper import attention as hopper_attention
from pallas_kernels.attention.hopper import step as hopper_step
from pallas_kernels.attention.partition import partition_attention, partition_attention_step
from pallas_kernels.attention.tpu import attention as tpu_attention
from pallas_kernels.dispatch import Implementation, Operator
from pallas_kernels.hardware import hopper, tpu


def _on_tpu(q, *others, **named) -> str | None:
    if q.shape[1] == 1:
        return "a single query, which fills no block"
    return tpu_attention.supports(q, *others, **named)


ATTENTION = Operator(
    "attention",
    arguments,
    partition_attention,
    (
        Implementation("mosaic_tpu", tpu_attention.attention, tpu, _on_tpu),
        Implementation(
            "mosaic_gpu",
            hopper_attention.attention,
            hopper,
            hopper_attention.supports,
            hopper_attention.gradients_by,
            ("d_q",),
        ),
        Implementation("xla", xla.attention),
    ),
)

ATTENTION_STEP = Operator(
    "attention_step",
    step_arguments,
    partition_attention_step,
    (
        Implementation("mosaic_gpu", hopper_step.step, hopper, hopper_step.supports),
        Implementation("xla", step.step),
    ),
)
