"""The pieces every block is made of: Linear, RMSNorm, the gated MLP, the embedding.

Weights keep the dtype they are stored in and are cast to the activation's dtype when used, so one
set of parameters serves f32 and bf16 computation. f32 activations mean f32 arithmetic on every
device (matmul precision HIGHEST).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.nn.rngs import Rngs


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for f32 and wider (no silent TF32 or bf16 passes), the device's native one
    otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


class Linear(nnx.Module):
    """y = x kernel + bias, kernel [in, out]. Fresh kernels are U(+-1/sqrt(in)), biases zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, rngs: Rngs):
        bound = in_features**-0.5
        self.kernel = nnx.Param(
            jax.random.uniform(rngs(), (in_features, out_features), minval=-bound, maxval=bound)
        )
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.dot(x, self.kernel[...].astype(x.dtype), precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis: variance in f32, cast back to the input dtype, then
    times weight."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(features))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, features: int, hidden: int, *, bias: bool = False, rngs: Rngs):
        self.gate_proj = Linear(features, hidden, bias=bias, rngs=rngs)
        self.up_proj = Linear(features, hidden, bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, features, bias=bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """Token table [vocab, width]; also the output head where the two are tied."""

    def __init__(self, vocab: int, features: int, *, std: float, rngs: Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs(), (vocab, features)))

    def __call__(self, tokens: Array, dtype) -> Array:
        return self.embedding[...][tokens].astype(dtype)

    def attend(self, x: Array) -> Array:
        """Scores of every token: x [..., width] -> [..., vocab]."""
        return jnp.einsum(
            "...d,vd->...v",
            x,
            self.embedding[...].astype(x.dtype),
            precision=matmul_precision(x.dtype),
        )
