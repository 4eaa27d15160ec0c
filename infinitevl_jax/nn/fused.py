"""Linear layers that read the same input, each by itself or fused into one matrix.

A module names them in its class:

    class GatedMLP(nnx.Module):
        gate_up_proj = JointGate("gate_proj", "up_proj")

`self.gate_up_proj(x)` applies them all. In training and in checkpoints each is a layer of its own.
A model that serves has one layer with all of their weights as `gate_up_proj` instead, which hides
the attribute of the class (`infinitevl_jax.nn.fused_params`). Calls do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.products import matmul_precision, project
from pallas_kernels.columns import Columns
from pallas_kernels.projection.api import COLUMNS

if TYPE_CHECKING:
    from infinitevl_jax.nn.layers import Linear, RMSNorm


@dataclass(frozen=True)
class SideBySide:
    """Matrices side by side: [..., width] each -> [..., columns].

    Attributes:
      widths: columns of each.
      shards: devices that split the columns. Each has its share of every matrix, as if each was
        split by itself: the columns of the first device, of all matrices, come first.
    """

    widths: tuple[int, ...]
    shards: int = 1

    def join(self, parts: Sequence[Array]) -> Array:
        """The columns of a device are filled up with zeros to what the operator takes."""
        lead = parts[0].shape[:-1]
        shares = jnp.concatenate([x.reshape(*lead, self.shards, -1) for x in parts], -1)
        spare = [(0, 0)] * (len(lead) + 1) + [(0, -shares.shape[-1] % COLUMNS)]
        return jnp.pad(shares, spare).reshape(*lead, -1)

    def places(self) -> list[tuple[int, int]] | None:
        """First column and width of each; None where shares of devices come in between."""
        if self.shards > 1:
            return None
        return [(sum(self.widths[:i]), width) for i, width in enumerate(self.widths)]

    def part(self, joined: Array, i: int) -> Array:
        """The i-th of them, or the product with it."""
        lead, shards = joined.shape[:-1], self.shards
        start, width = sum(self.widths[:i]) // shards, self.widths[i] // shards
        shares = joined.reshape(*lead, shards, -1)[..., start : start + width]
        return shares.reshape(*lead, -1)


@dataclass(frozen=True)
class Pair:
    """Two matrices of one shape: [..., width] each -> [..., 2, width]."""

    def join(self, parts: Sequence[Array]) -> Array:
        return jnp.stack(parts, -2)

    def part(self, joined: Array, i: int) -> Array:
        return joined[..., i, :]


Layout = SideBySide | Pair


class Fused(nnx.Module):
    """Linear layers with one kernel [in, ...] and bias [...], laid out as `layout` says.

    It is made from layers without values.
    """

    def __init__(self, linears: Sequence[Linear], layout: Layout):
        self.layout, self.count = layout, len(linears)
        self.kernel = self._joined([x.kernel for x in linears])
        biases = [x.bias for x in linears if x.bias is not None]
        self.bias = self._joined(biases) if biases else None

    def _joined(self, parts: Sequence[nnx.Param]) -> nnx.Param:
        facts = parts[0].get_metadata()["facts"]
        shape = jax.eval_shape(self.layout.join, [x.get_value() for x in parts])
        return nnx.Param(shape, facts=facts)

    @property
    def first(self) -> Array:
        """The matrix that is read first."""
        return self.kernel[...]

    @property
    def _bias(self) -> Array | None:
        return None if self.bias is None else self.bias[...]

    def _product(self, x: Array) -> Array:
        y = jnp.tensordot(
            x, self.kernel[...].astype(x.dtype), 1, precision=matmul_precision(x.dtype)
        )
        return y if self._bias is None else y + self._bias.astype(x.dtype)

    def _split(self, y: Array) -> tuple[Array, ...]:
        return tuple(self.layout.part(y, i) for i in range(self.count))


class FusedLinears(Fused):
    """`Joint` in a model that serves."""

    def __call__(self, x: Array) -> tuple[Array, ...]:
        return self._split(self._product(x))

    def step(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> tuple[Array, ...]:
        return self._split(
            project(ops, x, self.kernel[...], self._bias, norm=norm, prefetch=prefetch)
        )

    def columns(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> tuple[Array | Columns, ...]:
        y = project(ops, x, self.kernel[...], self._bias, norm=norm, prefetch=prefetch)
        return self._columns(y[:, 0])

    def apart(self, x: Array) -> tuple[Array | Columns, ...]:
        return self._columns(self._product(x))

    def _columns(self, y: Array) -> tuple[Array | Columns, ...]:
        places = self.layout.places()
        return self._split(y) if places is None else tuple(Columns(y, *at) for at in places)


class FusedGate(Fused):
    """`JointGate` in a model that serves."""

    def __call__(self, x: Array) -> Array:
        gate, up = self._split(self._product(x))
        return jax.nn.silu(gate) * up

    def step(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> Array:
        return project(ops, x, self.kernel[...], self._bias, norm=norm, prefetch=prefetch)


@dataclass(frozen=True)
class SeparateLinears:
    linears: Sequence[Linear]

    @property
    def first(self) -> Array:
        return self.linears[0].kernel[...]

    def __call__(self, x: Array) -> tuple[Array, ...]:
        return tuple(linear(x) for linear in self.linears)

    def step(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> tuple[Array, ...]:
        *others, last = self.linears
        done = [linear.step(ops, x, norm=norm) for linear in others]
        return *done, last.step(ops, x, norm=norm, prefetch=prefetch)

    def columns(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> tuple[Array | Columns, ...]:
        return tuple(y[:, 0] for y in self.step(ops, x, norm, prefetch))

    def apart(self, x: Array) -> tuple[Array | Columns, ...]:
        return self(x)


class SeparateGate(SeparateLinears):
    def __call__(self, x: Array) -> Array:
        gate, up = self.linears
        return jax.nn.silu(gate(x)) * up(x)

    def step(
        self, ops: Ops, x: Array, norm: RMSNorm | None = None, prefetch: Array | None = None
    ) -> Array:
        gate, up = super().step(ops, x, norm, prefetch)
        return jax.nn.silu(gate) * up


class Joint:
    """Names of a module's Linear layers that read the same input: a class attribute, which may be
    fused.

    The instance's attribute is called as `(x) -> one result a layer`, or as `.apart(x)`, which may
    give `Columns` of one array; for one token of each sequence as
    `.step(ops, x [batch, 1, width], norm, prefetch) -> one result a layer`, or as
    `.columns(...) -> [batch, columns] each`, which may be `Columns` as well. `.first` is the matrix
    that it reads first.
    """

    separate: ClassVar[type] = SeparateLinears
    fused: ClassVar[type[Fused]] = FusedLinears

    def __init__(self, *names: str):
        self.names = names

    def __get__(self, module, owner=None):
        if module is None:
            return self
        return self.separate([getattr(module, name) for name in self.names])

    def layout(self, widths: tuple[int, ...], shards: int) -> Layout:
        """Of matrices with so many columns, which a mesh splits into so many parts."""
        return SideBySide(widths, shards)


class JointGate(Joint):
    """The same for silu(gate(x)) * up(x), which is the result."""

    separate = SeparateGate
    fused = FusedGate

    def layout(self, widths: tuple[int, ...], shards: int) -> Layout:
        return Pair()
