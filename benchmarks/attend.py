"""Window attention of a sequence with itself on one GPU: ours for Hopper, ours in XLA, and cuDNN through JAX; PyTorch's flex attention
and tokamax's Mosaic GPU kernel where they import.

    python -m benchmarks.attend                    # 4K to 256K tokens; appends to benchmarks/results/attend.jsonl
    python -m benchmarks.attend --lengths 4096 131072
    ncu --metrics sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active -k regex:attend \\
        python -m benchmarks.attend --lengths 32768 --implementations mosaic_gpu --once

Batch 1, 16 query heads on 2 key heads, 128 wide, bfloat16, causal, window 8192. Errors first (relative RMS against
softmax in float64, on 1,500 tokens and a window of 400), then times: several calls on the same random inputs in one
program (of PyTorch: in one CUDA graph), median of 20 programs.
"""

import argparse
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cuda_graphs
from benchmarks.record import add_commit, record, versions
from benchmarks.timing import compiled, milliseconds, repeated, summary
from pallas_kernels.attend import Mask, mosaic_gpu, reference, xla
from pallas_kernels.testing.parity import rel_rms

WINDOW, HEADS, KEY_HEADS, WIDTH = 8192, 16, 2, 128


def draw(length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = HEADS, KEY_HEADS, KEY_HEADS
    return tuple(jax.random.normal(key, (1, length, n, WIDTH), jnp.bfloat16) for key, n in zip(keys, heads, strict=True))


def ours(attend, window: int, q, k, v):
    index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return attend(q, k, v, index, index, None, None, Mask(window=window, aligned=True), WIDTH**-0.5)[0]


def cudnn(window: int, q, k, v):
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return attend(q, k, v, local_window_size=(window - 1, 0))


def tokamax(window: int, q, k, v):
    from tokamax import dot_product_attention

    return dot_product_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation="mosaic_gpu")


IMPLEMENTATIONS = {
    "mosaic_gpu": partial(ours, mosaic_gpu.attend),
    "cudnn": cudnn,
    "tokamax": tokamax,
    "xla": partial(ours, xla.attend),
}


NAMES = [*IMPLEMENTATIONS, "flex"]
PACKAGES = {"tokamax": ("tokamax",), "flex": ("torch", "triton")}


def with_backward(function, q, k, v):
    """Gradients of sum(out * out) / 2, cast to the inputs' dtype."""
    out, pull = jax.vjp(function, q, k, v)
    return pull(out)


def in_jax(function, window: int, *inputs) -> tuple:
    """out, dq, dk and dv."""
    return jax.jit(lambda *a: (function(window, *a), *with_backward(partial(function, window), *a)))(*inputs)


class Flex:
    """PyTorch's flex attention, compiled by Inductor, as if it were called from JAX."""

    def __init__(self):
        import torch
        from torch.nn.attention import flex_attention

        self.torch, self.flex = torch, flex_attention
        self.attend = torch.compile(flex_attention.flex_attention, dynamic=False)

    def call(self, window: int, inputs, backward: bool):
        """What computes out and, if asked for, the gradients, [batch, heads, length, width] all."""
        self.torch.compiler.reset()  # it keeps only so many shapes before it would compile none
        tensors = [cuda_graphs.tensor(x, self.torch.bfloat16).transpose(1, 2).contiguous().requires_grad_(backward) for x in inputs]
        length = tensors[0].shape[2]

        def seen(batch, head, q, k):
            return (k <= q) & (q - k < window)

        mask = self.flex.create_block_mask(seen, None, None, length, length, device="cuda", _compile=True)

        def call():
            with self.torch.set_grad_enabled(backward):
                out = self.attend(*tensors, block_mask=mask, enable_gqa=True)
                return (out, *self.torch.autograd.grad(out, tensors, out.detach())) if backward else (out,)

        return call

    def __call__(self, window: int, *inputs) -> tuple:
        return tuple(x.detach().transpose(1, 2).float().cpu().numpy() for x in self.call(window, inputs, True)())

    def milliseconds(self, length: int, work: str) -> list[float]:
        return cuda_graphs.milliseconds(self.call(WINDOW, draw(length), work != "forward"), calls_of(length))


def errors(run, length: int = 1500, window: int = 400) -> dict[str, float]:
    """Relative RMS errors of out, dq, dk and dv; `run` takes a window and the inputs."""
    inputs = draw(length)
    with jax.enable_x64(True):
        exact = in_jax(partial(ours, reference.attend), window, *(x.astype(jnp.float64) for x in inputs))
    names = ("out", "d_q", "d_k", "d_v")
    return {n: round(rel_rms(np.asarray(a, np.float64), b), 5) for n, a, b in zip(names, run(window, *inputs), exact, strict=True)}


def in_programs(function, lengths: list[int]):
    """(length, work) -> milliseconds of each of several calls, by programs compiled here for all of them."""
    one = partial(function, WINDOW)
    works = {"forward": one, "forward+backward": partial(with_backward, one)}
    cells = itertools.product(lengths, works)
    programs = compiled({(n, work): (repeated(works[work], calls_of(n)), jax.eval_shape(partial(draw, n))) for n, work in cells})
    return lambda length, work: milliseconds(programs[length, work], draw(length), calls_of(length))


def calls_of(length: int) -> int:
    """Calls in a program: 80 thousand tokens, that launches may not count."""
    return max(1, 81920 // length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(12, 19)])
    parser.add_argument("--once", action="store_true", help="run each once with its backward pass and record nothing, for a profiler")
    parser.add_argument("--implementations", nargs="+", choices=NAMES, default=NAMES)
    add_commit(parser)
    options = parser.parse_args()
    shared = {"op": "attend", "heads": [HEADS, KEY_HEADS], "width": WIDTH, "window": WINDOW, "dtype": "bfloat16"}
    for name in options.implementations:
        try:
            run = Flex() if name == "flex" else partial(in_jax, IMPLEMENTATIONS[name])
            if options.once:
                for length in options.lengths:
                    jax.block_until_ready(run(WINDOW, *draw(length)))
                continue
            found = errors(run)
        except Exception as reason:  # not installed, or not for this device
            print(f"{name} is left out: {type(reason).__name__}: {str(reason).strip()[:200]}", flush=True)
            continue
        take = run.milliseconds if name == "flex" else in_programs(IMPLEMENTATIONS[name], options.lengths)
        for length, work in itertools.product(options.lengths, ("forward", "forward+backward")):
            try:
                times = take(length, work)
            except Exception as reason:  # such as memory
                print(f"{name:10} {work:16} {length} fails: {str(reason)[:200]}", flush=True)
                continue
            peer = {"versions": versions(*PACKAGES[name])} if name in PACKAGES else {}
            result = {"implementation": name, **peer, "work": work, "length": length, "ms": summary(times), "errors": found}
            record("attend", options.commit, shared | result)


if __name__ == "__main__":
    main()
