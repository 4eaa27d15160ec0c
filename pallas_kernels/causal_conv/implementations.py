"""The implementations of the causal convolution, in order of preference."""

from pallas_kernels.causal_conv import mosaic_tpu, xla
from pallas_kernels.dispatch import Implementation, tpu

# On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl), for no chip was at hand.
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.causal_conv, tpu, mosaic_tpu.supports),
    Implementation("xla", xla.causal_conv),
)
