"""Compares an operator with its float64 reference, in value and gradient.

Errors are relative root mean squares: `rel_rms(got, want)`. Cases come from a numpy Generator, so
that a seed identifies them.
"""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

LENGTHS = (1, 63, 64, 65, 500, 1000)  # around one chunk of 64, and odd ones beyond

GATES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "keep": lambda rng, shape: np.zeros(shape),
    "mild": lambda rng, shape: -np.exp(rng.normal(-3.0, 1.0, shape)),
    "spread": lambda rng, shape: -30.0 * rng.random(shape) ** 6,
    "switch": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.0, -30.0),
    "forget": lambda rng, shape: np.full(shape, -30.0),
}
"""Log decays a step: from 1 to e^-30, alone and mixed."""


def fresh_gates(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Log decays of an untrained layer: A from 1 to 16 and steps from 0.001 to 0.1 over the heads,
    the last axis."""
    steps = np.exp(np.linspace(np.log(1e-3), np.log(0.1), shape[-1]))
    return -np.linspace(1, 16, shape[-1]) * steps * np.exp(0.3 * rng.standard_normal(shape))


def rel_rms(got, want) -> float:
    """Root mean square of got - want over that of want (over 1 if want is all zero). NaN in
    either gives NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: {got.shape} and {want.shape}")
    size = np.sqrt(np.mean(want**2)) if want.size else 0.0
    error = np.sqrt(np.mean((got - want) ** 2)) if want.size else 0.0
    return float(error / (size or 1.0))


def unit(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Random vectors of length one along the last axis."""
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def alike(rng: np.random.Generator, direction: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Vectors of one direction plus 5 % noise, like keys of real text after the convolution and
    SiLU.

    direction: normal numbers that broadcast to `shape`, such as [batch, 1, heads, width].
    """
    return direction + 0.05 * rng.standard_normal(shape)


def lengths(rng: np.random.Generator, total: int, pieces: int) -> list[int]:
    """Cut `total` into that many random pieces, none empty."""
    cuts = np.sort(rng.choice(np.arange(1, total), pieces - 1, replace=False))
    return np.diff([0, *cuts, total]).tolist()


def padding(counts: Sequence[int], length: int) -> np.ndarray:
    """token_index [batch, length] of rows with `counts` valid tokens each, then pads."""
    row = np.arange(length, dtype=np.int32)[None]
    return np.where(row < np.asarray(counts)[:, None], row, -1).astype(np.int32)


def packing(pieces: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """token_index and segment_ids [1, length] of one row that holds sequences of those lengths in
    order, then pads."""
    used = sum(pieces)
    token_index = np.concatenate([np.arange(n) for n in pieces] + [np.full(length - used, -1)])
    segment_ids = np.repeat(np.arange(len(pieces) + 1), [*pieces, length - used])
    return token_index[None].astype(np.int32), segment_ids[None].astype(np.int32)


def poison(x: np.ndarray, token_index: np.ndarray) -> np.ndarray:
    """x [batch, length, ...] with NaN where token_index is -1."""
    x = np.array(x)
    x[np.asarray(token_index) < 0] = np.nan
    return x


def compiler_options() -> dict | None:
    """Options for fast compilation: on a CPU without LLVM's optimiser (XLA's own passes run as
    usual), on a GPU without autotuning of products."""
    options = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": {"xla_gpu_autotune_level": 0}}
    return options.get(jax.default_backend())


def value_and_gradients(op: Callable) -> Callable:
    """`(inputs, cotangents, others) -> results and gradients in inputs` for `op(*inputs,
    **others)`, to be compiled.

    Inputs and results may be trees. Without cotangents there are no gradients: `()`.
    """

    def run(inputs, cotangents, others):
        if not cotangents:
            return op(*inputs, **others), ()
        results, pull = jax.vjp(lambda *args: op(*args, **others), *inputs)
        return results, pull(
            jax.tree.map(lambda ct, out: ct.astype(out.dtype), cotangents, results)
        )

    return run


def with_gradients(op: Callable, optimise: bool = False) -> Callable:
    """jit of `value_and_gradients(op)`, which returns numpy arrays. optimise: with LLVM's
    optimiser, for a small program that runs long, such as a loop over tokens."""
    run = value_and_gradients(op)

    @cache
    def compiled():  # not before the first call, so that importing a test starts no backend
        options = {"xla_backend_optimization_level": 1}
        return jax.jit(run, compiler_options=options if optimise else compiler_options())

    def call(inputs, cotangents, others=None):
        return jax.tree.map(
            np.asarray, compiled()(tuple(inputs), tuple(cotangents), dict(others or {}))
        )

    return call


def in_float64(run: Callable) -> Callable:
    """The same call with every floating array as float64 (`run` from `with_gradients`, of a
    reference)."""

    def widen(x):
        x = np.asarray(x)
        return jnp.asarray(x, np.int32 if np.issubdtype(x.dtype, np.integer) else np.float64)

    def call(*args):
        with jax.enable_x64(True):
            return run(*jax.tree.map(widen, args))

    return call
