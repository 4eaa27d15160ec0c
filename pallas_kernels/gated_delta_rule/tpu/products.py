"""Matrix products of the TPU kernels. Operand dtypes decide the precision; results are float32."""

import jax.numpy as jnp
from jax import lax

f32, bf16 = jnp.float32, jnp.bfloat16


def dot(a, b, contract: tuple[int, int] = (1, 0)):
    """Product of two matrices over the given axes: one pass of bfloat16 operands, or full
    float32."""
    precision = lax.Precision.HIGHEST if a.dtype == f32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=f32)


def halves(x) -> tuple:
    """float32 x as two bfloat16 arrays whose sum has 16 of its bits."""
    high = x.astype(bf16)
    return high, (x - high.astype(f32)).astype(bf16)


def dot_halves(a: tuple, b: tuple):
    """The product of two matrices given by their halves: three passes, two of them at once. The
    fourth would add 2^-16."""
    rows = a[0].shape[0]
    both = dot(jnp.concatenate(a), b[0])
    return both[:rows] + both[rows:] + dot(a[0], b[1])
