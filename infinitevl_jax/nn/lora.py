"""LoRA adapters beside linear layers (https://arxiv.org/abs/2106.09685). No layer knows of them.

A `Linear` is replaced by a `LoraLinear` after the model is made. Its parameters keep their names,
and two are added:

    layers.3.self_attn.q_proj.kernel   [in, out]
    layers.3.self_attn.q_proj.lora_a   [in, rank], U(+-1/sqrt(in)) at the start
    layers.3.self_attn.q_proj.lora_b   [rank, out], zeros at the start
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.initializers import Initializer, draw, fan_in, zeros
from infinitevl_jax.nn.layers import Axes, Linear, RMSNorm
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.parameter import parameter, stacked
from infinitevl_jax.nn.products import matmul_precision
from infinitevl_jax.nn.stack import Layout, place_of

if TYPE_CHECKING:
    from infinitevl_jax.nn.params import Parameter, Params

A, B = "lora_a", "lora_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in (A, B)


class LoraLinear(Linear):
    """y = x kernel + bias + scale (x A) B.

    The sum of kernel and adapter is never computed, and so neither is the kernel's gradient.
    """

    def __init__(self, linear: Linear, config: LoraConfig):
        """Take the place of a layer, which may be a stack of layers."""
        self.kernel, self.bias, self.scale = linear.kernel, linear.bias, config.scale
        facts, rank = linear.kernel.get_metadata()["facts"], config.rank
        *stack, width, out = linear.kernel.get_value().shape

        def side(shape: tuple[int, int], init: Initializer, axes: Axes, torch: str) -> nnx.Param:
            own = parameter(
                shape, init, axes, matmul=True, torch_name=f"{torch}.weight", transposed=True
            )
            return stacked(own, *stack)

        self.lora_a = side((width, rank), fan_in, (facts.axes[0], None), "lora_A")
        self.lora_b = side((rank, out), zeros, (None, facts.axes[1]), "lora_B")

    def __call__(self, x: Array) -> Array:
        a, b = (side[...].astype(x.dtype) for side in (self.lora_a, self.lora_b))
        precision = matmul_precision(x.dtype)
        inner = self.scale * jnp.dot(x, a, precision=precision)
        return super().__call__(x) + jnp.dot(inner, b, precision=precision)

    def step(
        self,
        ops: Ops,
        x: Array,
        *,
        norm: RMSNorm | None = None,
        residual: Array | None = None,
        prefetch: Array | None = None,
    ) -> Array:
        y = self(x if norm is None else norm(x))
        return y if residual is None else residual + y


def add_adapters(model: nnx.Module, stacks: Mapping[str, Layout], config: LoraConfig) -> None:
    """Replace the linear layers of a model that `config.targets` match.

    Args:
      stacks: layout of each stack of the model, by dotted name.

    Raises:
      InfiniteVLError: a pattern matches no layer, or only some layers of a stack.
    """
    nodes = dict(nnx.iter_graph(model))
    linears = {
        path: (node, place_of(path, stacks).layers)
        for path, node in nodes.items()
        if isinstance(node, Linear) and _is_matrix(node)
    }
    names = [name for _, layers in linears.values() for name in layers]
    chosen: set[str] = set()
    for pattern in config.targets:
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            shown = ", ".join(sorted(names)[:: max(1, len(names) // 4)][:4])
            raise InfiniteVLError(
                f"train.lora.targets: {pattern!r} matches no linear layer",
                f"names look like {shown}",
            )
        chosen |= set(hits)
    for path, (linear, layers) in linears.items():
        adapted = [name for name in layers if name in chosen]
        if adapted and len(adapted) < len(layers):
            other = next(name for name in layers if name not in chosen)
            raise InfiniteVLError(
                f"train.lora.targets match {adapted[0]}, but not {other}, which is scanned with it",
                "match the layers of a stack together",
            )
        if adapted:
            setattr(nodes[path[:-1]], str(path[-1]), LoraLinear(linear, config))


def _is_matrix(linear: Linear) -> bool:
    """Whether it is a linear layer in torch too, not a convolution."""
    return len(linear.kernel.get_metadata()["facts"].torch_shape) == 2


def initialize_adapters(
    known: "Mapping[str, Parameter]", key: Array, shardings: Mapping | None = None
) -> "Params":
    """New adapters, which change nothing. Every layout gives the same values.

    Args:
      known: parameters of the model (`infinitevl_jax.nn.params.parameters`).
      shardings: by name; each device creates its own shards.
    """
    return draw({n: p for n, p in known.items() if is_adapter(n)}, key, shardings=shardings)


def merge_adapters(params: "Mapping[str, Array]", scale: float) -> "Params":
    """Parameters in either layout without adapters: each is added to its kernel, in float32, and
    the sum is cast to the kernel's dtype."""

    @jax.jit
    def merged(kernel: Array, a: Array, b: Array) -> Array:
        wide = [x.astype(jnp.float32) for x in (kernel, a, b)]
        added = jnp.matmul(wide[1], wide[2], precision=jax.lax.Precision.HIGHEST)
        return (wide[0] + scale * added).astype(kernel.dtype)

    out = {name: value for name, value in params.items() if not is_adapter(name)}
    for name, a in params.items():
        module, _, side = name.rpartition(".")
        if side == A:
            kernel = f"{module}.kernel"
            out[kernel] = merged(out[kernel], a, params[f"{module}.{B}"])
    return out
