"""Sliding-window attention of a sequence with itself on one GPU, beside its peers.

Implementations: `mosaic_gpu` (Hopper), `xla`, cuDNN through JAX; PyTorch's flex attention and
tokamax's Mosaic GPU kernel if they are installed.

Examples:

    # 4K to 256K tokens
    python -m benchmarks.attend

    # other lengths
    python -m benchmarks.attend --lengths 4096 131072

    # the vision tower
    python -m benchmarks.attend --case tower_windows tower_slices --lengths 4096 16384

    # under a profiler
    ncu --metrics sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active -k regex:attend \\
        python -m benchmarks.attend --lengths 32768 --implementations mosaic_gpu --once

Batch 1, bfloat16. The case `decoder` has 16 query heads on 2 key heads of width 128, causal, with a
window of 8192. The cases of the vision tower have 16 heads of width 80, not causal, in windows of
64 patches or slices of 1,024; only `mosaic_gpu` and `xla` run them.

Errors are measured first: relative RMS against softmax in float64 on 1,500 tokens, with a window of
400 for the decoder. Then times: several calls on the same random inputs in one program (PyTorch: in
one CUDA graph), the median of 20 programs. Results go to benchmarks/results/attend.jsonl.
"""

import argparse
import dataclasses
import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cuda_graphs
from benchmarks.record import add_commit, record, versions
from benchmarks.timing import compiled, milliseconds, repeated, summary
from pallas_kernels.attention import Mask, reference, xla
from pallas_kernels.attention.hopper import attention as hopper
from pallas_kernels.testing.parity import rel_rms


class Case(NamedTuple):
    heads: int
    key_heads: int
    width: int
    mask: Mask
    segment: int | None = None  # tokens of each packed sequence


CASES = {
    "decoder": Case(16, 2, 128, Mask(window=8192, aligned=True)),
    "tower_windows": Case(16, 16, 80, Mask(causal=False, window=64, aligned=True), 64),
    "tower_slices": Case(16, 16, 80, Mask(causal=False, window=1024, aligned=True), 1024),
}


def draw(case: Case, length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = case.heads, case.key_heads, case.key_heads
    return tuple(
        jax.random.normal(key, (1, length, n, case.width), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )


def by_contract(attention, case: Case, q, k, v):
    row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    index, segment = (row % case.segment, row // case.segment) if case.segment else (row, None)
    return attention(q, k, v, index, index, segment, segment, case.mask, case.width**-0.5)[0]


def cudnn(case: Case, q, k, v):
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return attend(q, k, v, local_window_size=(case.mask.window - 1, 0))


def tokamax(case: Case, q, k, v):
    from tokamax import dot_product_attention

    return dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(case.mask.window - 1, 0),
        implementation="mosaic_gpu",
    )


IMPLEMENTATIONS = {
    "mosaic_gpu": partial(by_contract, hopper.attention),
    "cudnn": cudnn,
    "tokamax": tokamax,
    "xla": partial(by_contract, xla.attention),
}


NAMES, PEERS = [*IMPLEMENTATIONS, "flex"], ("cudnn", "tokamax", "flex")
PACKAGES = {"tokamax": ("tokamax",), "flex": ("torch", "triton")}


def with_backward(function, q, k, v):
    """Gradients of sum(out * out) / 2, cast to the inputs' dtype."""
    out, pull = jax.vjp(function, q, k, v)
    return pull(out)


def in_jax(function, case: Case, *inputs) -> tuple:
    """out, dq, dk and dv."""
    return jax.jit(lambda *a: (function(case, *a), *with_backward(partial(function, case), *a)))(
        *inputs
    )


class Flex:
    """PyTorch's flex attention, compiled by Inductor, with JAX arrays in and numpy arrays out."""

    def __init__(self):
        import torch
        from torch.nn.attention import flex_attention

        self.torch, self.flex = torch, flex_attention
        self.attend = torch.compile(flex_attention.flex_attention, dynamic=False)

    def call(self, case: Case, inputs, backward: bool):
        """A function that computes out and, if `backward`, the gradients.

        All are [batch, heads, length, width].
        """
        self.torch.compiler.reset()  # it stops compiling after a limited number of shapes
        tensors = [
            cuda_graphs.tensor(x, self.torch.bfloat16)
            .transpose(1, 2)
            .contiguous()
            .requires_grad_(backward)
            for x in inputs
        ]
        length = tensors[0].shape[2]

        def seen(batch, head, q, k):
            return (k <= q) & (q - k < case.mask.window)

        mask = self.flex.create_block_mask(
            seen, None, None, length, length, device="cuda", _compile=True
        )

        def call():
            with self.torch.set_grad_enabled(backward):
                out = self.attend(*tensors, block_mask=mask, enable_gqa=True)
                return (
                    (out, *self.torch.autograd.grad(out, tensors, out.detach()))
                    if backward
                    else (out,)
                )

        return call

    def __call__(self, case: Case, *inputs) -> tuple:
        return tuple(
            x.detach().transpose(1, 2).float().cpu().numpy()
            for x in self.call(case, inputs, True)()
        )

    def milliseconds(self, case: Case, length: int, work: str) -> list[float]:
        return cuda_graphs.milliseconds(
            self.call(case, draw(case, length), work != "forward"), calls_of(length)
        )


def errors(run, case: Case, length: int = 1500) -> dict[str, float]:
    """Relative RMS errors of out, dq, dk and dv; `run` takes a case and the inputs."""
    case = case._replace(
        mask=dataclasses.replace(
            case.mask, window=min(case.mask.window, 400 if case.mask.causal else length)
        )
    )
    inputs = draw(case, length)
    with jax.enable_x64(True):
        exact = in_jax(
            partial(by_contract, reference.attention),
            case,
            *(x.astype(jnp.float64) for x in inputs),
        )
    names = ("out", "d_q", "d_k", "d_v")
    return {
        n: round(rel_rms(np.asarray(a, np.float64), b), 5)
        for n, a, b in zip(names, run(case, *inputs), exact, strict=True)
    }


def in_programs(function, case: Case, lengths: list[int]):
    """Compile a program for each length and work.

    Returns the function (length, work) -> milliseconds per call, one number per program run.
    """
    one = partial(function, case)
    works = {"forward": one, "forward+backward": partial(with_backward, one)}
    cells = itertools.product(lengths, works)
    programs = compiled(
        {
            (n, work): (repeated(works[work], calls_of(n)), jax.eval_shape(partial(draw, case, n)))
            for n, work in cells
        }
    )
    return lambda length, work: milliseconds(
        programs[length, work], draw(case, length), calls_of(length)
    )


def calls_of(length: int) -> int:
    """Calls per program: 80 thousand tokens, so that launch overhead is negligible."""
    return max(1, 81920 // length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[2**power for power in range(12, 19)],
        help="tokens of the sequence",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="run each implementation once with its backward pass; record nothing (for a profiler)",
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=NAMES, default=NAMES, help="default: all"
    )
    parser.add_argument(
        "--case", nargs="+", choices=CASES, default=["decoder"], help="default: decoder"
    )
    add_commit(parser)
    options = parser.parse_args()
    for case in options.case:
        for name in options.implementations:
            measure(case, name, options)


def measure(case_name: str, name: str, options: argparse.Namespace) -> None:
    """Measure errors and times of an implementation, or print why it is left out."""
    case = CASES[case_name]
    shared = {
        "op": "attend",
        "heads": [case.heads, case.key_heads],
        "width": case.width,
        "window": case.mask.window,
        "dtype": "bfloat16",
    }
    shared |= {} if case_name == "decoder" else {"case": case_name}
    try:
        if case.segment and name in PEERS:
            raise ValueError("it takes one causal sequence only")
        run = Flex() if name == "flex" else partial(in_jax, IMPLEMENTATIONS[name])
        if options.once:  # gradients only: returning out as well would run the forward pass twice
            once = (
                partial(run, case)
                if name == "flex"
                else jax.jit(partial(with_backward, partial(IMPLEMENTATIONS[name], case)))
            )
            for length in options.lengths:
                jax.block_until_ready(once(*draw(case, length)))
            return
        found = errors(run, case)
    except Exception as reason:  # not installed, or wrong device
        print(
            f"{name} is left out of {case_name}: {type(reason).__name__}:"
            f" {str(reason).strip()[:200]}",
            flush=True,
        )
        return
    take = (
        partial(run.milliseconds, case)
        if name == "flex"
        else in_programs(IMPLEMENTATIONS[name], case, options.lengths)
    )
    for length, work in itertools.product(options.lengths, ("forward", "forward+backward")):
        try:
            times = take(length, work)
        except Exception as reason:  # for example, out of memory
            print(f"{name:10} {work:16} {length} fails: {str(reason)[:200]}", flush=True)
            continue
        peer = {"versions": versions(*PACKAGES[name])} if name in PACKAGES else {}
        result = {
            "implementation": name,
            **peer,
            "work": work,
            "length": length,
            "ms": summary(times),
            "errors": found,
        }
        record("attend", options.commit, shared | result)


if __name__ == "__main__":
    main()
