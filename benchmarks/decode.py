"""One token of each sequence through the mixers alone, without their projections, on one GPU: ours for Hopper, its
definition in XLA, and the separate operations that the layers are made of.

    python -m benchmarks.decode                    # batches of 1, 8 and 64; appends to benchmarks/results/decode.jsonl
    python -m benchmarks.decode --batches 1 --ops attend

Sizes of the 4.4 B model, bfloat16: 27 Gated DeltaNet layers, each with its own state, or 9 window layers with full rings,
in one program of several tokens, a layer's output being the next one's gate or query; states are updated in place and
come from memory, for together they are larger than the L2 cache. Errors first (relative RMS of out, and of the memory,
against float64 on the same bfloat16 numbers), then the time of a layer: the median of 10 programs, and, from the
profiler, the time that its kernels run and how many they are.
"""

import argparse
import itertools
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import add_commit, record
from benchmarks.timing import compiled, summary
from benchmarks.trace import kernels
from infinitevl_jax.model.attention import KeyValueRing, slot_index, write
from pallas_kernels.attend import Mask, attend, decode_mosaic_gpu, merge
from pallas_kernels.attend import decode as attend_decode
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.gated_delta_rule import decode as delta_decode
from pallas_kernels.gated_delta_rule import decode_mosaic_gpu as delta_mosaic_gpu
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.testing.parity import rel_rms
from pallas_kernels.unit_heads import unit_heads

HEADS, KEYS, VALUES, EPS = 16, 128, 256, 1e-5
Q_HEADS, KEY_HEADS, WIDTH, WINDOW = 16, 2, 128, 8192
LAYERS = {"gated_delta_rule": 27, "attend": 9}
TOKENS = 32  # of a program: launching it may not count

bf16 = jnp.bfloat16


def delta_layers(inputs, weights, state, index, eps):
    """The operations of `infinitevl_jax.model.deltanet`, one after the other."""
    index, batch = index[:, None], len(index)
    segment = jnp.zeros_like(index)

    def convolve(x, weight, tail):
        y, tail = causal_conv(x[:, None], weight, tail, index, segment)
        return y, tail

    q, q_tail = convolve(inputs.q, weights.q_conv, state.q_tail)
    k, k_tail = convolve(inputs.k, weights.k_conv, state.k_tail)
    v, v_tail = convolve(inputs.v, weights.v_conv, state.v_tail)
    q, k = (unit_heads(q, HEADS, 1e-6) * KEYS**-0.5).astype(q.dtype), unit_heads(k, HEADS, 1e-6).astype(k.dtype)
    q, k, v = (x.reshape(batch, 1, HEADS, -1) for x in (q, k, v))
    a, b, rate, bias = (x.astype(jnp.float32) for x in (inputs.a, inputs.b, weights.A_log, weights.dt_bias))
    g = (-jnp.exp(rate) * jax.nn.softplus(a + bias))[:, None]
    out, memory = gated_delta_rule(q, k, v, g, jax.nn.sigmoid(b)[:, None], state.memory, index, segment)
    wide = out.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * weights.norm.astype(jnp.float32)
    out = (wide.reshape(batch, -1) * jax.nn.silu(inputs.gate.astype(jnp.float32))).astype(out.dtype)
    return out, delta_decode.State(memory, q_tail, k_tail, v_tail)


def attend_layers(q, k, v, ring, index, window, scale):
    """The operations of `infinitevl_jax.model.attention`, one after the other."""
    index, length = index[:, None], jnp.maximum(index, 0)
    q, k, v = q[:, None], k[:, None], v[:, None]
    segment = jnp.zeros_like(index)
    own = attend(q, k, v, index, index, segment, segment, mask=Mask(window=window, aligned=True), scale=scale)
    held = slot_index(length, ring.k.shape[1])
    cached = attend(q, ring.k, ring.v, index, held, None, None, mask=Mask(window=window), scale=scale)
    ring = write(KeyValueRing(*ring), k, v, index)
    return merge(*own, *cached)[0][:, 0], attend_decode.Ring(*ring)


IMPLEMENTATIONS = {
    "gated_delta_rule": {"mosaic_gpu": delta_mosaic_gpu.step, "xla": delta_decode.step, "layers": delta_layers},
    "attend": {"mosaic_gpu": decode_mosaic_gpu.step, "xla": attend_decode.step, "layers": attend_layers},
}


@partial(jax.jit, static_argnames="batch")
def draw_delta(batch: int, seed: int):
    """Inputs, weights and state of a layer."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape, dtype=bf16, scale=1.0):
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    widths = HEADS * KEYS, HEADS * KEYS, HEADS * VALUES
    inputs = delta_decode.Inputs(*(normal(batch, n) for n in (*widths, HEADS * VALUES, HEADS, HEADS)))
    convolutions = (normal(4, n, scale=0.5) for n in widths)
    weights = delta_decode.Weights(*convolutions, normal(HEADS), normal(HEADS) - 4, 1 + normal(VALUES, scale=0.2))
    memory = normal(batch, HEADS, KEYS, VALUES, dtype=jnp.float32, scale=0.3)
    return inputs, weights, delta_decode.State(memory, *(normal(batch, 3, n) for n in widths))


@partial(jax.jit, static_argnames="batch")
def draw_attend(batch: int, seed: int):
    """q, k, v and a ring."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    q, k, v = (jax.random.normal(next(keys), (batch, n, WIDTH), bf16) for n in (Q_HEADS, KEY_HEADS, KEY_HEADS))
    ring = (jax.random.normal(next(keys), (batch, WINDOW, KEY_HEADS, WIDTH), bf16) for _ in range(2))
    return q, k, v, attend_decode.Ring(*ring)


def in_numpy(arrays):
    return jax.tree.map(np.asarray, arrays)


def in_float64(step):
    """`step` of the same numbers in float64; takes and returns numpy arrays."""
    jitted = jax.jit(step)

    def run(*args):
        with jax.enable_x64(True):
            return in_numpy(jitted(*jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float64), args)))

    return run


def check_same(got, want, rows=slice(None)) -> None:
    """Raise unless these rows of all arrays are equal."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a[rows].astype(np.float64), b[rows].astype(np.float64))


def replaced(x: np.ndarray, rows: np.ndarray, by: float) -> np.ndarray:
    """x with some sequences' numbers replaced by one."""
    return np.where(rows.reshape(-1, *[1] * (x.ndim - 1)), np.asarray(by, x.dtype), x)


def error(got, want, rows) -> float:
    return round(rel_rms(np.asarray(got, np.float64)[rows], want[rows]), 6)


def delta_errors(step, batch: int) -> dict[str, float]:
    """The second of two tokens, every third sequence standing still with poisoned inputs; tails and still sequences must be exact."""
    inputs, weights, state = in_numpy(draw_delta(batch, 1))
    before = in_numpy(draw_delta(batch, 2)[0])
    index = np.where(np.arange(batch) % 3 == 1, -1, 5).astype(np.int32)
    still = index < 0
    poisoned, clean = ([jax.tree.map(partial(replaced, rows=still, by=by), x) for x in (before, inputs)] for by in (np.nan, 0))
    poisoned = [x._replace(gate=inputs.gate) for x in poisoned]  # the layers multiply by it last of all

    def twice(step, before, inputs, weights, state, index):
        _, state = step(before, weights, state, index, EPS)
        return step(inputs, weights, state, index, EPS)

    want, want_state = in_float64(partial(twice, delta_decode.step))(*clean, weights, state, index)
    out, new = in_numpy(jax.jit(partial(twice, step))(*poisoned, weights, state, index))
    check_same(new, state, still)
    check_same(new[1:], want_state[1:])
    assert not out[still].any()
    return {"out": error(out, want, ~still), "memory": error(new.memory, want_state.memory, ~still)}


def attend_errors(step, batch: int) -> dict[str, float]:
    """Rings empty, partly filled, about to be full and wrapped, some sequences still; the new ring must be exact. A batch of
    one is tried with all lengths in turn; the worst counts."""
    lengths = [8192, 0, -1, 5, 4000, 8191, 8193, 20000, 127, 128, 129, 100000]
    q, k, v, ring = in_numpy(draw_attend(batch, 1))
    run, truth = (wrap(lambda *a, f=f: f(*a, WINDOW, WIDTH**-0.5)) for wrap, f in ((jax.jit, step), (in_float64, attend_decode.step)))
    found = []
    for shift in range(len(lengths) if batch == 1 else 1):
        index = np.asarray([lengths[(i + shift) % len(lengths)] for i in range(batch)], np.int32)
        still = index < 0
        clean, dirty = ([replaced(x, still, by) for x in (q, k, v)] for by in (0, np.nan))
        want, want_ring = truth(*clean, ring, index)
        out, new = in_numpy(run(*dirty, ring, index))
        check_same(new, want_ring)
        assert not out[still].any()
        found += [] if still.all() else [error(out, want, ~still)]
    return {"out": max(found)}


def delta_program(step):
    """A jitted program of TOKENS tokens through all layers; the first argument is given away and returned."""

    def program(states, gate, inputs, weights, index):
        def token(i, carry):
            states, gate = carry
            new = []
            for layer, state in enumerate(states):
                gate, state = step(inputs[layer]._replace(gate=gate), weights[layer], state, index + i, EPS)
                new.append(state)
            return new, gate

        return jax.lax.fori_loop(0, TOKENS, token, (states, gate))

    return jax.jit(program, donate_argnums=0)


def delta_arguments(batch: int):
    drawn = [draw_delta(batch, seed) for seed in range(LAYERS["gated_delta_rule"])]
    inputs, weights, states = (list(x) for x in zip(*drawn, strict=True))
    return states, inputs[0].gate, inputs, weights, jnp.full(batch, 9000, jnp.int32)


def attend_program(step):
    """Likewise."""

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
    q, k, v, rings = (list(x) for x in zip(*[draw_attend(batch, seed) for seed in range(LAYERS["attend"])], strict=True))
    return rings, q[0], k, v, jnp.full(batch, 9000, jnp.int32)


ERRORS = {"gated_delta_rule": delta_errors, "attend": attend_errors}
PROGRAMS = {"gated_delta_rule": (delta_program, delta_arguments), "attend": (attend_program, attend_arguments)}


MOST = 5e-3  # relative RMS error of each result


def times(run, arguments, layers: int, repeats: int = 10) -> dict:
    """Of one layer and token: wall time in microseconds, time of its kernels, and their number."""
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
    return {"us": summary(walls, 2), "kernel_us": round(sum(kernel.us for kernel in found) / per, 2), "kernels": round(len(found) / per, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS["attend"], default=list(IMPLEMENTATIONS["attend"]))
    add_commit(parser)
    options = parser.parse_args()
    sizes = {"gated_delta_rule": [HEADS, KEYS, VALUES], "attend": [Q_HEADS, KEY_HEADS, WIDTH, WINDOW]}
    cells = list(itertools.product(options.ops, options.implementations, options.batches))

    def program(op, name, batch):
        make, arguments = PROGRAMS[op]
        return make(IMPLEMENTATIONS[op][name]), jax.eval_shape(partial(arguments, batch))

    programs = compiled({cell: program(*cell) for cell in cells})
    for op, name, batch in cells:
        case = {"op": f"{op}, token step", "dtype": "bfloat16", "sizes": sizes[op], "implementation": name, "batch": batch}
        try:
            found = ERRORS[op](IMPLEMENTATIONS[op][name], batch)
            print(f"{case['op']} by {name}, batch {batch}: errors {found}", flush=True)
            if max(found.values()) > MOST:
                raise ValueError(f"an error above {MOST}: not timed")
            took = times(programs[op, name, batch], PROGRAMS[op][1](batch), LAYERS[op])
        except Exception as reason:  # the others are worth having all the same
            print(f"{case['op']} by {name}, batch {batch} fails: {type(reason).__name__}: {str(reason).strip()[:200]}", flush=True)
            continue
        record("decode", options.commit, case | took | {"errors": found})


if __name__ == "__main__":
    main()
