"""How PyTorch's kernels are timed beside ours: several calls in one CUDA graph, so that launches do
not count."""

import gc
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.timing import REPEATS


def tensor(x: jax.Array | np.ndarray, dtype):
    """A tensor of its own on the GPU."""
    import torch

    return (
        (torch.from_dlpack(x) if isinstance(x, jax.Array) else torch.tensor(x, device="cuda"))
        .clone()
        .to(dtype)
    )


def milliseconds(call: Callable[[], None], calls: int) -> list[float]:
    """Of one call, over `REPEATS` runs of a graph of `calls` calls, after two to warm up."""
    from torch import cuda

    stream, graph = cuda.Stream(), cuda.CUDAGraph()
    with cuda.stream(stream):
        for _ in range(3):
            call()
    cuda.synchronize()
    gc.collect()  # an older graph that is freed while this one is recorded would end the recording
    with cuda.graph(
        graph, stream=stream, capture_error_mode="thread_local"
    ):  # JAX's threads go on beside it
        for _ in range(calls):
            call()
    times = []
    for i in range(REPEATS + 2):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) / calls)
    return times
