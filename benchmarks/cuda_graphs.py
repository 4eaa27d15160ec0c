"""Times of PyTorch kernels: several calls in one CUDA graph, so that launches do not count."""

import gc
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.timing import REPEATS


def tensor(x: jax.Array | np.ndarray, dtype):
    """A copy on the GPU."""
    import torch

    return (
        (torch.from_dlpack(x) if isinstance(x, jax.Array) else torch.tensor(x, device="cuda"))
        .clone()
        .to(dtype)
    )


def milliseconds(call: Callable[[], None], calls: int) -> list[float]:
    """Milliseconds per call: one number for each of `REPEATS` runs of a graph of `calls` calls.

    Two runs before them are warm-up.
    """
    from torch import cuda

    stream, graph = cuda.Stream(), cuda.CUDAGraph()
    with cuda.stream(stream):
        for _ in range(3):
            call()
    cuda.synchronize()
    gc.collect()  # freeing an older graph during the capture would end the capture
    with cuda.graph(
        graph, stream=stream, capture_error_mode="thread_local"
    ):  # JAX's threads run during the capture
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
