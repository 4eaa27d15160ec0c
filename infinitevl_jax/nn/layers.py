"""The pieces every block is made of: Linear, RMSNorm, the gated MLP, the embedding.

Weights keep the dtype they are stored in and are cast to the activation's dtype when used, so one
set of parameters serves f32 and bf16 computation. f32 activations mean f32 arithmetic on every
device (matmul precision HIGHEST).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.nn.parameter import parameter
from infinitevl_jax.nn.rngs import Rngs

Axes = tuple[str | None, str | None]


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for f32 and wider (no silent TF32 or bf16 passes), else the device's native one."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


class Linear(nnx.Module):
    """y = x kernel + bias, kernel [in, out]. Fresh kernels are U(+-1/sqrt(in)), biases zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: Axes,
        *,
        bias: bool = False,
        torch_shape: tuple[int, ...] | None = None,
        rngs: Rngs,
    ):
        """
        Args:
          axes: logical axes of the kernel.
          torch_shape: of the kernel in a torch checkpoint, where it is not [out, in].
        """
        bound = in_features**-0.5
        self.kernel = parameter(
            (in_features, out_features),
            lambda shape: jax.random.uniform(rngs(), shape, minval=-bound, maxval=bound),
            axes,
            matmul=True,
            torch_name="weight",
            torch_shape=torch_shape,
            transposed=True,
        )
        # "width" is split for storage alone, which is not worth it for a vector
        split = None if axes[1] == "width" else axes[1]
        self.bias = parameter((out_features,), jnp.zeros, (split,), decay=False) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.dot(x, self.kernel[...].astype(x.dtype), precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis: variance in f32, cast back, then times weight."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.weight = parameter((features,), jnp.ones, (None,), decay=False)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, features: int, hidden: int, *, bias: bool = False, rngs: Rngs):
        self.gate_proj = Linear(features, hidden, ("width", "hidden"), bias=bias, rngs=rngs)
        self.up_proj = Linear(features, hidden, ("width", "hidden"), bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, features, ("hidden", "width"), bias=bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """Token table [vocab, width]; also the output head where the two are tied."""

    def __init__(self, vocab: int, features: int, *, std: float, rngs: Rngs):
        self.embedding = parameter(
            (vocab, features),
            lambda shape: std * jax.random.normal(rngs(), shape),
            ("vocab", "width"),
            torch_name="weight",
        )

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
