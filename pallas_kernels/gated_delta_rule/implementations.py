"""The implementations of the gated delta rule, in order of preference: kernels where a recorded benchmark puts them ahead, XLA everywhere."""

from pallas_kernels.dispatch import Implementation, hopper, tpu
from pallas_kernels.gated_delta_rule import mosaic_gpu, mosaic_tpu, xla

IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_gpu.gated_delta_rule, hopper, mosaic_gpu.supports),  # benchmarks/results/gated_delta_rule.jsonl
    Implementation("mosaic_tpu", mosaic_tpu.gated_delta_rule, tpu, lambda q, k, v, *_, **__: mosaic_tpu.supports(q, k, v)),
    Implementation("xla", xla.gated_delta_rule),
)
