"""Compares results with float64 and with an earlier call, on the device: one program a case, and
nothing large is fetched."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def judge(
    first: Sequence, got: Sequence, want: Sequence, exact: Sequence
) -> tuple[jax.Array, jax.Array]:
    """For each result, how far `got` is from `want` and whether any bit of it differs from `first`,
    as two vectors.

    first, got: results of two calls. want: the same in float64.
    exact: for each result None, or a mask of its leading axes. Where it is set, the result must
        equal `want` to the sign of a zero, or the error is infinite.

    Errors are relative root mean squares (see `parity.rel_rms`) over what is finite in `want`. -inf
    must be where it is in `want`, or the error is NaN. Compile and call it under
    `jax.enable_x64(True)`. Raises ValueError where shapes differ.
    """
    errors = [_error(*x) for x in zip(got, want, exact, strict=True)]
    differs = [jnp.any(_bits(a) != _bits(b)) for a, b in zip(first, got, strict=True)]
    return jnp.stack(errors), jnp.stack(differs)


def _error(got: jax.Array, want: jax.Array, exact: jax.Array | None) -> jax.Array:
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: {got.shape} and {want.shape}")
    got = got.astype(jnp.float64)
    seen = jnp.isfinite(want)
    count = jnp.maximum(seen.sum(), 1)

    def size(x):
        return jnp.sqrt(jnp.sum(jnp.where(seen, x, 0) ** 2) / count)

    whole = size(want)
    error = size(got - want) / jnp.where(whole == 0, 1, whole)
    error = jnp.where((jnp.isneginf(got) == ~seen).all(), error, jnp.nan)
    if exact is None:
        return error
    same = (got == want) & (jnp.signbit(got) == jnp.signbit(want))
    mask = exact.reshape(exact.shape + (1,) * (got.ndim - exact.ndim))
    return jnp.where((same | ~mask).all(), error, jnp.inf)


def _bits(x: jax.Array) -> jax.Array:
    return x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))
