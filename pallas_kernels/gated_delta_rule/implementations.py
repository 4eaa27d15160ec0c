"""The implementations of the gated delta rule, in order of preference."""

from pallas_kernels.dispatch import Implementation, hopper, tpu
from pallas_kernels.gated_delta_rule import mosaic_gpu, mosaic_tpu, xla


def _on_tpu(q, k, v, *others, **named):
    return mosaic_tpu.supports(q, k, v)


# On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl), for no chip was at hand; on Hopper because the
# whole model is faster with them (benchmarks/results/prefill.jsonl and train_step.jsonl).
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.gated_delta_rule, tpu, _on_tpu),
    Implementation("mosaic_gpu", mosaic_gpu.gated_delta_rule, hopper, mosaic_gpu.supports),
    Implementation("xla", xla.gated_delta_rule),
)
