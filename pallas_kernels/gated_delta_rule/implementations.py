"""The implementations of the gated delta rule and of its layer's token step, in order of preference."""

from pallas_kernels.dispatch import Implementation, hopper, tpu
from pallas_kernels.gated_delta_rule import decode, decode_mosaic_gpu, mosaic_gpu, mosaic_tpu, xla


def _on_tpu(q, k, v, *others, **named):
    return mosaic_tpu.supports(q, k, v)


def _step_on_hopper(inputs, weights, state, index, eps):
    return decode_mosaic_gpu.supports(inputs, weights, state)


# On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl), for no chip was at hand; on Hopper because the
# whole model is faster with them (benchmarks/results/prefill.jsonl and train_step.jsonl).
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.gated_delta_rule, tpu, _on_tpu),
    Implementation("mosaic_gpu", mosaic_gpu.gated_delta_rule, hopper, mosaic_gpu.supports),
    Implementation("xla", xla.gated_delta_rule),
)

# What `decode.step` says.
STEPS = (
    Implementation("mosaic_gpu", decode_mosaic_gpu.step, hopper, _step_on_hopper),
    Implementation("xla", decode.step),
)
