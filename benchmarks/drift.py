"""Whether a Gated DeltaNet state drifts over a long stream: the float32 token step against a
float64 recurrence of the same tokens.

Examples:

    # a million tokens
    python -m benchmarks.drift

    # the kernel of a GPU, where it takes the sizes
    python -m benchmarks.drift --tokens 20000 --implementation mosaic_gpu,xla

Three heads with keys and values of 4: one that forgets, one that never does, and one that never
does and has keys that are nearly alike, so that little is ever erased. Prints the errors (relative
RMS of the last state and of all outputs) of each part of the stream.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from pallas_kernels.gated_delta_rule import DeltaState, gated_delta_rule_step
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.testing.parity import alike, rel_rms

HEADS, KEYS, VALUES, TAPS, EPS = 3, 4, 4, 4, 1e-5
PART = 10_000  # tokens a launch


def draw_weights() -> Weights:
    rng = np.random.default_rng(0)
    convolutions = (0.5 * rng.standard_normal((TAPS, HEADS * n)) for n in (KEYS, KEYS, VALUES))
    rates = np.array([1.0, -60.0, -60.0]), np.array([-4.0, 0.0, 0.0])
    norm = 1 + 0.2 * rng.standard_normal(VALUES)
    return Weights(*(np.float32(x) for x in (*convolutions, *rates, norm)))


def draw_inputs(part: int) -> Inputs:
    """Projections of the tokens of a part, [PART, 1, channels]."""
    rng = np.random.default_rng(1 + part)
    sizes = (KEYS, KEYS, VALUES, VALUES, 1, 1)
    drawn = [rng.standard_normal((PART, 1, HEADS, n)) for n in sizes]
    drawn[1][:, :, 2] = alike(rng, np.ones(KEYS), (PART, 1, KEYS))
    return Inputs(*(np.float32(x.reshape(PART, 1, -1)) for x in drawn))


def empty() -> DeltaState:
    tails = (np.zeros((1, TAPS - 1, HEADS * n), np.float32) for n in (KEYS, KEYS, VALUES))
    return DeltaState(np.zeros((1, HEADS, KEYS, VALUES), np.float32), *tails)


def recurrence(
    inputs: Inputs, weights: Weights, state: DeltaState
) -> tuple[np.ndarray, DeltaState]:
    """The layer between its projections in float64, token by token.

    Returns out [PART, 1, channels] and the state after it.
    """
    w = Weights(*(np.float64(x) for x in weights))
    tails, flows = [], []
    for x, tail, taps in zip(inputs[:3], state[1:], w[:3], strict=True):
        seen = np.concatenate([tail[0], x[:, 0]]).astype(np.float64)
        y = sum(seen[i : i + PART] * taps[i] for i in range(TAPS))
        flows.append((y / (1 + np.exp(-y))).reshape(PART, HEADS, -1))
        tails.append(seen[None, 1 - TAPS :])
    q, k, v = flows
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    gate, a, b = (np.float64(x[:, 0]) for x in inputs[3:])
    decays = np.exp(-np.exp(w.A_log) * np.logaddexp(0, a + w.dt_bias))
    betas = 1 / (1 + np.exp(-b))
    memory, out = np.float64(state.recurrent_state[0]), np.empty_like(v)
    for t in range(PART):
        memory = decays[t, :, None, None] * memory
        update = betas[t, :, None] * (v[t] - (k[t, :, :, None] * memory).sum(1))
        memory = memory + k[t, :, :, None] * update[:, None]
        out[t] = (q[t, :, :, None] * memory).sum(1) * KEYS**-0.5
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + EPS) * w.norm
    out = out.reshape(PART, -1) * gate / (1 + np.exp(-gate))
    return out[:, None], DeltaState(memory[None], *tails)


def drift(tokens: int, implementation: str | None = None) -> Iterator[dict[str, float]]:
    """The errors after each part of a stream of so many tokens (a multiple of PART)."""
    weights = draw_weights()
    step = partial(gated_delta_rule_step, eps=EPS, implementation=implementation)

    @jax.jit
    def run(state, inputs, first):
        def token(state, now):
            inputs, index = now
            out, state = step(inputs, weights, state, index)
            return state, out

        index = first + np.arange(PART, dtype=np.int32)[:, None]
        return jax.lax.scan(token, state, (inputs, index))

    state = exact = empty()
    for part in range(tokens // PART):
        inputs = draw_inputs(part)
        state, out = run(state, inputs, np.int32(part * PART))
        wanted, exact = recurrence(inputs, weights, exact)
        yield {
            "tokens": (part + 1) * PART,
            "state": rel_rms(state.recurrent_state, exact.recurrent_state),
            "out": rel_rms(out, wanted),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument("--implementation", help="of the token step (default: the first that can)")
    options = parser.parse_args()
    if options.tokens < PART or options.tokens % PART:
        parser.error(f"--tokens {options.tokens}: give a multiple of {PART}")
    worst = 0.0
    for found in drift(options.tokens, options.implementation):
        worst = max(worst, found["state"], found["out"])
        print(", ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)
    print(f"worst error {worst:.3g}")


if __name__ == "__main__":
    main()
