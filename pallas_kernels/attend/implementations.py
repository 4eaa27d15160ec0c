"""The implementations of `attend`, in order of preference: kernels where a recorded benchmark puts them ahead, else XLA."""

from pallas_kernels.attend import mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.dispatch import Implementation, hopper, tpu


def _of_tensors(supports):
    """Whether a kernel takes a case depends on tensors, mask and scale alone."""
    return lambda q, k, v, q_index, k_index, q_segment, k_segment, mask, scale: supports(q, k, v, mask, scale)


# The kernels for Hopper stand behind XLA, to be asked for by name, until benchmarks.full_size has been run with them.
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.attend, tpu, _of_tensors(mosaic_tpu.supports)),  # benchmarks/results/tpu_scores.jsonl
    Implementation("xla", xla.attend),
    Implementation("mosaic_gpu", mosaic_gpu.attend, hopper, _of_tensors(mosaic_gpu.supports)),  # benchmarks/results/attend.jsonl
)
