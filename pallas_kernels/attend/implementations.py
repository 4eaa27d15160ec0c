"""The implementations of `attend` and of its token step, in order of preference."""

from pallas_kernels.attend import cudnn, decode, decode_mosaic_gpu, mosaic_gpu, mosaic_tpu, xla
from pallas_kernels.dispatch import Implementation, ampere, hopper, tpu


def _on_hopper(q, k, v, q_index, k_index, q_segment, k_segment, mask, scale):
    return mosaic_gpu.supports(q, k, v, mask, scale, q_segment is not None)


def _gradients_on_hopper(q, k, v, q_index, k_index, q_segment, k_segment, mask, scale):
    return mosaic_gpu.gradients_by(mask)


def _on_tpu(q, k, v, q_index, k_index, q_segment, k_segment, mask, scale):
    return "a single query, which fills no block" if q.shape[1] == 1 else mosaic_tpu.supports(q, k, v, mask, scale)


def _by_cudnn(q, k, v, q_index, k_index, q_segment, k_segment, mask, scale):
    return cudnn.supports(q, k, v, mask, q_segment is not None)


def _step_on_hopper(q, k, v, ring, index, window, scale):
    return decode_mosaic_gpu.supports(q, k, v, ring, window, scale)


# On a TPU the kernels come first by static score (benchmarks/results/tpu_scores.jsonl), for no chip was at hand; on Hopper because the
# whole model is faster with them (benchmarks/results/prefill.jsonl and train_step.jsonl). cuDNN, which takes
# part of the cases (the model's calls always have segments) and was not faster than the Hopper kernels at 4K to 128K tokens (attend.jsonl),
# runs where it is asked for: xla, before it, takes every case.
IMPLEMENTATIONS = (
    Implementation("mosaic_tpu", mosaic_tpu.attend, tpu, _on_tpu),
    Implementation("mosaic_gpu", mosaic_gpu.attend, hopper, _on_hopper, _gradients_on_hopper, ("d_q",)),
    Implementation("xla", xla.attend),
    Implementation("cudnn", cudnn.attend, ampere, _by_cudnn, unordered=("d_q",)),
)

# What `decode.step` says.
STEPS = (
    Implementation("mosaic_gpu", decode_mosaic_gpu.step, hopper, _step_on_hopper),
    Implementation("xla", decode.step),
)
