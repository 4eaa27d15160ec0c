"""One token per sequence through the mixers, without projections, on one GPU.

Implementations: `mosaic_gpu` (the one-token step for Hopper) and `xla` (its definition), of which
the model runs the first that takes the case, and `layers` (the separate operations by which the
layers process any number of tokens).

Examples:

    # batches of 1, 8 and 64
    python -m benchmarks.decode

    # attention with one sequence
    python -m benchmarks.decode --batches 1 --ops attend

Sizes of the 4.4 B model, bfloat16: 27 Gated DeltaNet layers, each with its own state, or 9 window
layers with full ring buffers. One program computes several tokens. The output of a layer is the
gate or query of the next one. States are updated in place. Together they are larger than the L2
cache, so they are read from memory.

Errors are measured first, by the parity matrix (pallas_kernels.testing.matrix). Then the time per
layer: the median of 10 programs and, from the profiler, the time and number of its kernels. Results
go to benchmarks/results/decode.jsonl.
"""

import argparse
import itertools
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.record import add_commit, record
from benchmarks.timing import compiled, summary
from benchmarks.trace import kernels
from pallas_kernels.attention import KVCache, Mask, held_tokens, merge, write
from pallas_kernels.attention.implementations import ATTENTION_STEP
from pallas_kernels.attention.xla import attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import DeltaState
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE_STEP
from pallas_kernels.gated_delta_rule.xla import gated_delta_rule
from pallas_kernels.l2norm.xla import l2norm
from pallas_kernels.short_conv.xla import short_conv
from pallas_kernels.testing.cases import Case, attention_step_case, gated_delta_rule_step_case
from pallas_kernels.testing.cells import Group
from pallas_kernels.testing.comparison import compare, prepare
from pallas_kernels.testing.steps import implementation_in_a_row

HEADS, KEYS, VALUES, EPS = 16, 128, 256, 1e-5
Q_HEADS, KEY_HEADS, WIDTH, WINDOW = 16, 2, 128, 8192
LAYERS = {"gated_delta_rule": 27, "attend": 9}
TOKENS = 32  # per program, so that its launch is negligible

bf16 = jnp.bfloat16


def delta_layers(inputs, weights, state, index, eps):
    """The separate operations of `GatedDeltaNet.__call__` in `infinitevl_jax.nn.mixers`."""
    index, batch = index[:, None], len(index)
    segment = jnp.zeros_like(index)

    def convolve(x, weight, conv_state):
        return short_conv(x[:, None], weight, conv_state, index, segment)

    q, q_conv_state = convolve(inputs.q, weights.q_conv, state.q_conv_state)
    k, k_conv_state = convolve(inputs.k, weights.k_conv, state.k_conv_state)
    v, v_conv_state = convolve(inputs.v, weights.v_conv, state.v_conv_state)
    q, k = (
        (l2norm(q, HEADS, 1e-6) * KEYS**-0.5).astype(q.dtype),
        l2norm(k, HEADS, 1e-6).astype(k.dtype),
    )
    q, k, v = (x.reshape(batch, 1, HEADS, -1) for x in (q, k, v))
    a, b, rate, bias = (
        x.astype(jnp.float32) for x in (inputs.a, inputs.b, weights.A_log, weights.dt_bias)
    )
    g = (-jnp.exp(rate) * jax.nn.softplus(a + bias))[:, None]
    out, recurrent_state = gated_delta_rule(
        q, k, v, g, jax.nn.sigmoid(b)[:, None], state.recurrent_state, index, segment
    )
    wide = out.astype(jnp.float32)
    wide = (
        wide
        * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
        * weights.norm.astype(jnp.float32)
    )
    out = (wide.reshape(batch, -1) * jax.nn.silu(inputs.gate.astype(jnp.float32))).astype(out.dtype)
    return out, DeltaState(recurrent_state, q_conv_state, k_conv_state, v_conv_state)


def attend_layers(q, k, v, kv_cache, index, window, scale, sinks):
    """The separate operations of `SoftmaxAttention.__call__` in `infinitevl_jax.nn.mixers`."""
    index, length = index[:, None], jnp.maximum(index, 0)
    q, k, v = q[:, None], k[:, None], v[:, None]
    segment = jnp.zeros_like(index)
    own = attention(
        *(q, k, v, index, index, segment, segment),
        mask=Mask(window=window, sinks=sinks, aligned=True),
        scale=scale,
    )
    held = held_tokens(length, kv_cache.k.shape[1], sinks)
    cached = attention(
        *(q, kv_cache.k, kv_cache.v, index, held),
        mask=Mask(window=window, sinks=sinks),
        scale=scale,
    )
    return merge(*own, *cached)[0][:, 0], write(kv_cache, k, v, index, sinks)


IMPLEMENTATIONS = {
    "gated_delta_rule": (
        {x.name: x.run for x in GATED_DELTA_RULE_STEP.implementations} | {"layers": delta_layers}
    ),
    "attend": {x.name: x.run for x in ATTENTION_STEP.implementations} | {"layers": attend_layers},
}


@partial(jax.jit, static_argnames="batch")
def draw_delta(batch: int, seed: int):
    """Inputs, weights and state of a layer."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape, dtype=bf16, scale=1.0):
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    widths = HEADS * KEYS, HEADS * KEYS, HEADS * VALUES
    inputs = Inputs(*(normal(batch, n) for n in (*widths, HEADS * VALUES, HEADS, HEADS)))
    convolutions = (normal(4, n, scale=0.5) for n in widths)
    weights = Weights(
        *convolutions, normal(HEADS), normal(HEADS) - 4, 1 + normal(VALUES, scale=0.2)
    )
    recurrent_state = normal(batch, HEADS, KEYS, VALUES, dtype=jnp.float32, scale=0.3)
    return inputs, weights, DeltaState(recurrent_state, *(normal(batch, 3, n) for n in widths))


@partial(jax.jit, static_argnames="batch")
def draw_attend(batch: int, seed: int):
    """q, k, v and a ring."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    q, k, v = (
        jax.random.normal(next(keys), (batch, n, WIDTH), bf16)
        for n in (Q_HEADS, KEY_HEADS, KEY_HEADS)
    )
    ring = (
        jax.random.normal(next(keys), (batch, WINDOW, KEY_HEADS, WIDTH), bf16) for _ in range(2)
    )
    return q, k, v, KVCache(*ring)


def delta_cases(batch: int) -> list[Case]:
    """Two consecutive tokens; every third sequence is a pad (index -1)."""
    tokens = [[-1 if i % 3 == 1 else token for i in range(batch)] for token in (5, 6)]
    return [gated_delta_rule_step_case("two tokens", tokens, HEADS, keys=KEYS, values=VALUES)]


def attend_cases(batch: int) -> list[Case]:
    """Ring buffers partly filled, nearly full and wrapped; some sequences are pads (index -1).

    A batch of one is checked with each length.
    """
    lengths = [8192, 4000, -1, 8191, 8193, 20000, 100_000]
    rows = [[length] for length in lengths] if batch == 1 else [(lengths * batch)[:batch]]
    return [
        attention_step_case("a token", [row], (Q_HEADS, KEY_HEADS), WIDTH, WINDOW, WINDOW)
        for row in rows
    ]


def with_erased_gates(inputs, weights, state, index, eps):
    """`delta_layers` with the gates of pads set to 0.

    The matrix poisons pads with NaN, and `delta_layers` multiplies by the gate last. In a model the
    gate of a pad is finite.
    """
    gate = jnp.where(index[:, None] >= 0, inputs.gate, 0)
    return delta_layers(inputs._replace(gate=gate), weights, state, index, eps)


def errors(op: str, name: str, batch: int) -> dict[str, float]:
    """The largest error of each result.

    Raises ValueError if an error is above the tolerance of the parity matrix.
    """
    operator, cases = CASES[op]
    step = (
        with_erased_gates
        if IMPLEMENTATIONS[op][name] is delta_layers
        else IMPLEMENTATIONS[op][name]
    )
    checked = (implementation_in_a_row(Implementation(name, step)),)
    groups = [Group(operator, case, "bfloat16", checked) for case in cases(batch)]
    found = [
        cell
        for group in groups
        for cell in compare(group, prepare(group, compiled=False), repeats=1)
    ]
    if bad := [str(cell) for cell in found if not cell.share <= 1]:
        raise ValueError(f"not timed: {bad[0]}")
    return {
        result: round(max(cell.errors[result] for cell in found), 6) for result in found[0].errors
    }


def delta_program(step):
    """A jitted program of TOKENS tokens through all layers; it donates and returns its first
    argument."""

    def program(states, gate, inputs, weights, index):
        def token(i, carry):
            states, gate = carry
            new = []
            for layer, state in enumerate(states):
                gate, state = step(
                    inputs[layer]._replace(gate=gate), weights[layer], state, index + i, EPS
                )
                new.append(state)
            return new, gate

        return jax.lax.fori_loop(0, TOKENS, token, (states, gate))

    return jax.jit(program, donate_argnums=0)


def delta_arguments(batch: int):
    drawn = [draw_delta(batch, seed) for seed in range(LAYERS["gated_delta_rule"])]
    inputs, weights, states = (list(x) for x in zip(*drawn, strict=True))
    return states, inputs[0].gate, inputs, weights, jnp.full(batch, 9000, jnp.int32)


def attend_program(step):
    """As `delta_program`."""

    def program(rings, q, k, v, index):
        def token(i, carry):
            rings, q = carry
            new = []
            for layer, ring in enumerate(rings):
                q, ring = step(q, k[layer], v[layer], ring, index + i, WINDOW, WIDTH**-0.5)
                new.append(ring)
            return new, q

        return jax.lax.fori_loop(0, TOKENS, token, (rings, q))

    return jax.jit(program, donate_argnums=0)


def attend_arguments(batch: int):
    q, k, v, rings = (
        list(x)
        for x in zip(*[draw_attend(batch, seed) for seed in range(LAYERS["attend"])], strict=True)
    )
    return rings, q[0], k, v, jnp.full(batch, 9000, jnp.int32)


CASES = {
    "gated_delta_rule": ("gated_delta_rule_step", delta_cases),
    "attend": ("attention_step", attend_cases),
}
PROGRAMS = {
    "gated_delta_rule": (delta_program, delta_arguments),
    "attend": (attend_program, attend_arguments),
}


def times(run, arguments, layers: int, repeats: int = 10) -> dict:
    """Per layer and token: wall time and kernel time in microseconds, number of kernels."""
    state, carry, *rest = arguments

    def again():
        nonlocal state, carry
        state, carry = run(state, carry, *rest)
        jax.block_until_ready(carry)

    again()
    again()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        again()
        walls.append((time.perf_counter() - start) / TOKENS / layers * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            again()
        found = kernels(folder)
    per = TOKENS * layers
    return {
        "us": summary(walls, 2),
        "kernel_us": round(sum(kernel.us for kernel in found) / per, 2),
        "kernels": round(len(found) / per, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ops", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64], help="sequences (default: 1 8 64)"
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS["attend"],
        default=list(IMPLEMENTATIONS["attend"]),
        help="default: all",
    )
    add_commit(parser)
    options = parser.parse_args()
    sizes = {
        "gated_delta_rule": [HEADS, KEYS, VALUES],
        "attend": [Q_HEADS, KEY_HEADS, WIDTH, WINDOW],
    }
    cells = list(itertools.product(options.ops, options.implementations, options.batches))

    def program(op, name, batch):
        make, arguments = PROGRAMS[op]
        return make(IMPLEMENTATIONS[op][name]), jax.eval_shape(partial(arguments, batch))

    programs = compiled({cell: program(*cell) for cell in cells})
    for op, name, batch in cells:
        case = {
            "op": f"{op}, token step",
            "dtype": "bfloat16",
            "sizes": sizes[op],
            "implementation": name,
            "batch": batch,
        }
        try:
            found = errors(op, name, batch)
            print(f"{case['op']} by {name}, batch {batch}: errors {found}", flush=True)
            took = times(programs[op, name, batch], PROGRAMS[op][1](batch), LAYERS[op])
        except Exception as reason:  # report it and measure the others
            print(
                f"{case['op']} by {name}, batch {batch} fails: {type(reason).__name__}:"
                f" {str(reason).strip()[:200]}",
                flush=True,
            )
            continue
        record("decode", options.commit, case | took | {"errors": found})


if __name__ == "__main__":
    main()
