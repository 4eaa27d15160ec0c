"""The implementations of the gated delta rule, in order of preference: kernels where a recorded benchmark puts them ahead, else XLA."""

from pallas_kernels.dispatch import Implementation, hopper, tpu
from pallas_kernels.gated_delta_rule import mosaic_gpu, mosaic_tpu, xla


def _of_tensors(q, k, v, *others, **named):
    return mosaic_tpu.supports(q, k, v)


# The kernels for Hopper stand behind XLA, to be asked for by name, until benchmarks.full_size has been run with them.
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.gated_delta_rule, tpu, _of_tensors),  # benchmarks/results/tpu_scores.jsonl
    Implementation("xla", xla.gated_delta_rule),
    Implementation("mosaic_gpu", mosaic_gpu.gated_delta_rule, hopper, mosaic_gpu.supports),
)
