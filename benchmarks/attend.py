"""Window attention of a sequence with itself on one GPU: ours for Hopper, ours in XLA, and cuDNN through JAX.

    python -m benchmarks.attend                    # 4K to 256K tokens; appends to benchmarks/results/attend.jsonl
    python -m benchmarks.attend --lengths 4096 131072
    ncu --metrics sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active -k regex:attend \\
        python -m benchmarks.attend --lengths 32768 --implementations mosaic_gpu --once

Batch 1, 16 query heads on 2 key heads, 128 wide, bfloat16, causal, window 8192. Errors first (relative RMS against
float32 softmax, on 1,500 tokens and a window of 400), then times: several calls on the same random inputs in one
program, median of 20 programs.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import add_commit, record
from benchmarks.timing import compiled, milliseconds, repeated, summary
from pallas_kernels.attend import Mask, mosaic_gpu, reference, xla
from pallas_kernels.testing.parity import rel_rms

WINDOW, HEADS, KEY_HEADS, WIDTH = 8192, 16, 2, 128


def draw(length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = HEADS, KEY_HEADS, KEY_HEADS
    return tuple(
        jax.random.normal(key, (1, length, n, WIDTH), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)
    )


def ours(attend, window: int, q, k, v):
    index = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return attend(q, k, v, index, index, None, None, Mask(window=window, aligned=True), WIDTH**-0.5)[0]


def cudnn(window: int, q, k, v):
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return attend(q, k, v, local_window_size=(window - 1, 0))


IMPLEMENTATIONS = {
    "mosaic_gpu": partial(ours, mosaic_gpu.attend),
    "cudnn": cudnn,
    "xla": partial(ours, xla.attend),
}


def with_backward(function, q, k, v):
    """Gradients of sum(out * out) / 2, cast to the inputs' dtype."""
    out, pull = jax.vjp(function, q, k, v)
    return pull(out)


def errors(function, length: int = 1500, window: int = 400) -> dict[str, float]:
    """Relative RMS errors of out, dq, dk and dv."""
    inputs = draw(length)
    exact = partial(ours, reference.attend, window)

    def run(function, dtype):
        arrays = [x.astype(dtype) for x in inputs]
        return jax.jit(lambda *a: (function(*a), *with_backward(function, *a)))(*arrays)

    pairs = zip(run(partial(function, window), jnp.bfloat16), run(exact, jnp.float32), strict=True)
    names = ("out", "d_q", "d_k", "d_v")
    return {n: round(rel_rms(np.asarray(a, np.float32), b), 5) for n, (a, b) in zip(names, pairs, strict=True)}


def calls_of(length: int) -> int:
    """Calls in a program: 80 thousand tokens, that launches may not count."""
    return max(1, 81920 // length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(12, 19)])
    parser.add_argument("--once", action="store_true", help="run each once with its backward pass and record nothing, for a profiler")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    add_commit(parser)
    options = parser.parse_args()
    shared = {"op": "attend", "heads": [HEADS, KEY_HEADS], "width": WIDTH, "window": WINDOW, "dtype": "bfloat16"}
    for name in options.implementations:
        function = IMPLEMENTATIONS[name]
        if options.once:
            for length in options.lengths:
                jax.block_until_ready(jax.jit(partial(with_backward, partial(function, WINDOW)))(*draw(length)))
            continue
        found = errors(function)
        one = partial(function, WINDOW)
        works = {"forward": one, "forward+backward": partial(with_backward, one)}
        cells = [(length, work) for length in options.lengths for work in works]
        programs = compiled({(n, work): (repeated(works[work], calls_of(n)), jax.eval_shape(partial(draw, n))) for n, work in cells})
        for length, work in cells:
            try:
                times = milliseconds(programs[length, work], draw(length), calls_of(length))
            except Exception as reason:  # such as memory
                print(f"{name:10} {work:16} {length} fails: {str(reason)[:200]}", flush=True)
                continue
            result = {"implementation": name, "work": work, "length": length, "ms": summary(times), "errors": found}
            record("attend", options.commit, shared | result)


if __name__ == "__main__":
    main()
