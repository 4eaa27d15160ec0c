"""Basic layers: Linear, RMSNorm, GatedMLP, Embedding.

Parameters keep their storage dtype and are cast to the activation dtype at use, so one set of
parameters serves float32 and bfloat16. Float32 activations use matmul precision HIGHEST.

`step` is the call for one token of each sequence, x [batch, 1, width], with the norm before it and
the addition of a residual after it. Its `prefetch` is the matrix that is read next.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.nn.fused import JointGate
from infinitevl_jax.nn.initializers import Normal, fan_in, ones, zeros
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.parameter import parameter
from infinitevl_jax.nn.products import matmul_precision, project

Axes = tuple[str | None, str | None]


class Linear(nnx.Module):
    """y = x kernel + bias. The kernel [in, out] starts as U(+-1/sqrt(in)), the bias as zeros."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: Axes,
        *,
        bias: bool = False,
        torch_shape: tuple[int, ...] | None = None,
    ):
        """Create a linear layer.

        Args:
          axes: logical axes of the kernel.
          torch_shape: shape of the weight in a torch checkpoint if it is not [out, in].
        """
        self.kernel = parameter(
            (in_features, out_features),
            fan_in,
            axes,
            matmul=True,
            torch_name="weight",
            torch_shape=torch_shape,
            transposed=True,
        )
        # "width" is sharded to save memory only; a vector is too small for that
        split = None if axes[1] == "width" else axes[1]
        self.bias = parameter((out_features,), zeros, (split,), decay=False) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.dot(x, self.kernel[...].astype(x.dtype), precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def step(
        self,
        ops: Ops,
        x: Array,
        *,
        norm: "RMSNorm | None" = None,
        residual: Array | None = None,
        prefetch: Array | None = None,
    ) -> Array:
        bias, kernel = None if self.bias is None else self.bias[...], self.kernel[...]
        return project(ops, x, kernel, bias, norm=norm, residual=residual, prefetch=prefetch)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis. The variance is float32."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.weight = parameter((features,), ones, (None,), decay=False)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    gate_up_proj = JointGate("gate_proj", "up_proj")

    def __init__(self, features: int, hidden: int, *, bias: bool = False):
        self.gate_proj = Linear(features, hidden, ("width", "hidden"), bias=bias)
        self.up_proj = Linear(features, hidden, ("width", "hidden"), bias=bias)
        self.down_proj = Linear(hidden, features, ("hidden", "width"), bias=bias)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.gate_up_proj(x))

    def step(self, ops: Ops, x: Array, norm: RMSNorm, prefetch: Array | None = None) -> Array:
        """x + mlp(norm(x))."""
        hidden = self.gate_up_proj.step(ops, x, norm, prefetch=self.down_proj.kernel[...])
        return self.down_proj.step(ops, hidden, residual=x, prefetch=prefetch)


class Embedding(nnx.Module):
    """Token embedding [vocab, width], and the output head if the two are tied."""

    def __init__(self, vocab: int, features: int, *, std: float):
        self.embedding = parameter(
            (vocab, features),
            Normal(std),
            ("vocab", "width"),
            torch_name="weight",
        )

    def __call__(self, tokens: Array, dtype) -> Array:
        return self.embedding[...][tokens].astype(dtype)

    def attend(self, x: Array) -> Array:
        """Logits: x [..., width] -> [..., vocab]."""
        return jnp.einsum(
            "...d,vd->...v",
            x,
            self.embedding[...].astype(x.dtype),
            precision=matmul_precision(x.dtype),
        )

    def attend_step(self, ops: Ops, x: Array, *, norm: RMSNorm) -> Array:
        return project(ops, x, self.embedding[...], norm=norm, transposed=True)
