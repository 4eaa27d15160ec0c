"""The gated delta rule on one GPU, beside fla (flash-linear-attention, Triton) if it is installed.

Implementations: `mosaic_gpu` (Hopper), `xla`, `fla`.

Examples:

    # 1K to 256K tokens
    python -m benchmarks.gated_delta_rule

    # two lengths, forward only
    python -m benchmarks.gated_delta_rule --shapes 1x32768 1x131072 --work forward

    # fewer heads
    python -m benchmarks.gated_delta_rule --shapes 1x8192 --heads 16 8 4 2

    # fla 0.6 also needs einops, torch and Triton
    pip install --no-deps fla-core flash-linear-attention einops

16 heads by default, keys of width 128, values of width 256, bfloat16, no initial state. The last
state is computed too.

Errors are measured first: relative RMS of the output and the last state against the recurrence in
float64 on the same bfloat16 inputs. They are the worst over several gates and keys at 1,000 tokens
and one case of 8,192, where few heads are split into spans. Then times: several calls on random
inputs in one program (fla: in one CUDA graph), the median of 20 programs. fla refuses its backward
pass on Hopper with some versions of Triton, whose results were found to be wrong. Its time is
measured all the same; its gradients are not compared. Results go to
benchmarks/results/gated_delta_rule.jsonl.
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
from pallas_kernels.gated_delta_rule import reference, xla
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as hopper
from pallas_kernels.testing.parity import GATES, rel_rms, unit

HEADS, KEY, VALUE = 16, 128, 256
SHAPES = [f"1x{2**power}" for power in range(10, 19)] + [f"{batch}x8192" for batch in (2, 4, 8)]


def draw(
    batch: int,
    length: int,
    heads: int = HEADS,
    gates: str = "mild",
    repeated: bool = False,
    seed: int = 0,
) -> list[np.ndarray]:
    """q, k, v, g and beta in float32; q, k and v hold bfloat16 numbers."""
    rng = np.random.default_rng(seed)
    lead = batch, length, heads
    k = unit(rng, (*lead, KEY))
    if repeated:
        k = np.broadcast_to(k[:, :1], k.shape)
    wide = unit(rng, (*lead, KEY)) * KEY**-0.5, k, rng.standard_normal((*lead, VALUE))
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in wide]
    return [
        *rounded,
        np.float32(GATES[gates](rng, lead)),
        np.float32(1 / (1 + np.exp(-2 * rng.standard_normal(lead)))),
    ]


def timed(batch: int, length: int, heads: int) -> list[jax.Array]:
    """Inputs of the same distributions, drawn on the device."""

    def numbers(key):
        keys, lead = jax.random.split(key, 5), (batch, length, heads)
        q, k = (jax.random.normal(key, (*lead, KEY)) for key in keys[:2])
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        v = jax.random.normal(keys[2], (*lead, VALUE))
        g, beta = (
            -jnp.exp(jax.random.normal(keys[3], lead) - 3),
            jax.nn.sigmoid(2 * jax.random.normal(keys[4], lead)),
        )
        return [
            (q * KEY**-0.5).astype(jnp.bfloat16),
            k.astype(jnp.bfloat16),
            v.astype(jnp.bfloat16),
            g,
            beta,
        ]

    return jax.jit(numbers)(jax.random.key(0))


def in_programs(function, shapes: list[tuple[int, int]], works: list[str], heads: int):
    """Compile a program for each shape and work.

    Returns the function (work, inputs) -> milliseconds per call, one number per program run.
    """
    calls = {"forward": function, "forward+backward": partial(with_backward, function)}
    cells = list(itertools.product(shapes, works))
    programs = compiled(
        {
            (s, w): (repeated(calls[w], calls_of(*s)), jax.eval_shape(partial(timed, *s, heads)))
            for s, w in cells
        }
    )

    def take(work: str, inputs: list[jax.Array]) -> list[float]:
        shape = inputs[0].shape[:2]
        return milliseconds(programs[shape, work], inputs, calls_of(*shape))

    return take


def in_jax(arrays: list[np.ndarray]) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]] + [jnp.asarray(x) for x in arrays[3:]]


def with_backward(function, *inputs):
    """Gradients of sum(out * out) / 2 with respect to all inputs."""
    (out, last), pull = jax.vjp(function, *inputs)
    return pull((out, jnp.zeros_like(last)))


def calls_of(batch: int, length: int) -> int:
    """Calls per program: half a million tokens, so that launch overhead is negligible."""
    return max(2, 2**19 // (batch * length))


class Fla:
    """fla's chunked kernels, with JAX arrays in and numpy arrays out."""

    def __init__(self):
        import torch
        from fla.ops.common import chunk_o
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        chunk_o.TRITON_ABOVE_3_7_1 = True  # otherwise its backward pass raises

        self.torch, self.rule = (
            torch,
            partial(chunk_gated_delta_rule, scale=1.0, output_final_state=True),
        )

    def tensors(self, arrays) -> list:
        return [
            cuda_graphs.tensor(x, self.torch.bfloat16 if i < 3 else self.torch.float32)
            for i, x in enumerate(arrays)
        ]

    def __call__(self, *arrays):
        with self.torch.no_grad():
            return [x.float().cpu().numpy() for x in self.rule(*self.tensors(arrays))]

    def milliseconds(self, work: str, inputs: list[jax.Array]) -> list[float]:
        tensors = [x.requires_grad_(work != "forward") for x in self.tensors(inputs)]

        def call():
            with self.torch.set_grad_enabled(work != "forward"):
                out, _ = self.rule(*tensors)
                if work != "forward":
                    self.torch.autograd.grad(out, tensors, out.detach())

        return cuda_graphs.milliseconds(call, calls_of(*inputs[0].shape[:2]))


JAX = {"mosaic_gpu": hopper.gated_delta_rule, "xla": xla.gated_delta_rule}
ERRORS = [(gates, repeated) for gates in ("mild", "spread", "keep") for repeated in (False, True)]


def truths(heads: int) -> list[tuple]:
    """(inputs, results in float64) of each case."""
    exact = jax.jit(reference.gated_delta_rule)

    def truth(arrays):
        with jax.enable_x64(True):
            return [np.asarray(x) for x in exact(*(jnp.asarray(x, jnp.float64) for x in arrays))]

    cases = [draw(1, 1000, heads, gates, repeated) for gates, repeated in ERRORS] + [
        draw(1, 8192, heads)
    ]
    return [(arrays, truth(arrays)) for arrays in cases]


def errors(function, cases: list[tuple]) -> dict[str, float]:
    found = [
        [
            rel_rms(np.asarray(a, np.float64), b)
            for a, b in zip(function(*arrays), right, strict=True)
        ]
        for arrays, right in cases
    ]
    return dict(
        zip(("out", "state"), (round(float(x), 5) for x in np.max(found, axis=0)), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BATCHxLENGTH")
    parser.add_argument(
        "--work",
        nargs="+",
        choices=["forward", "forward+backward"],
        default=["forward", "forward+backward"],
        help="default: both",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=[*JAX, "fla"],
        default=[*JAX, "fla"],
        help="default: all",
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[HEADS], help="default: 16")
    add_commit(parser)
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    for heads in options.heads:
        measure(heads, shapes, options)


def measure(heads: int, shapes: list[tuple[int, int]], options: argparse.Namespace) -> None:
    """Measure errors and times of all implementations with `heads` heads."""
    shared, cases = (
        {"op": "gated_delta_rule", "heads": heads, "widths": [KEY, VALUE], "dtype": "bfloat16"},
        truths(heads),
    )
    for name in options.implementations:
        if name == "fla":
            try:
                call = Fla()
            except ImportError as reason:
                print(f"fla is left out: {reason}")
                continue
            found, take = errors(call, cases), call.milliseconds
        else:
            run = jax.jit(JAX[name])
            found = errors(
                lambda *arrays, run=run: [np.asarray(x, np.float32) for x in run(*in_jax(arrays))],
                cases,
            )
            take = in_programs(JAX[name], shapes, options.work, heads)
        print(f"{name:10} errors {found}", flush=True)
        for (batch, length), work in itertools.product(shapes, options.work):
            try:
                times = take(work, timed(batch, length, heads))
            except Exception as reason:  # for example, out of memory
                print(
                    f"{name:10} {work:16} {batch}x{length} fails: {str(reason)[:200]}", flush=True
                )
                continue
            peer = {"versions": versions("fla-core", "triton", "torch")} if name == "fla" else {}
            result = {
                "implementation": name,
                **peer,
                "work": work,
                "shape": [batch, length],
                "ms": summary(times),
                "errors": found,
            }
            record("gated_delta_rule", options.commit, shared | result)


if __name__ == "__main__":
    main()
