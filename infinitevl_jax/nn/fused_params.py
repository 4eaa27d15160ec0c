"""Parameters of a model that serves: those of layers that read the same input are one matrix.

Such a model decodes with fewer and larger products. Nothing of it is written to a checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import getmembers_static
from typing import NamedTuple

import jax
from flax import nnx
from jax import Array

from infinitevl_jax.nn.fused import Joint, Layout


@dataclass(frozen=True)
class Group:
    """Linear layers that are fused.

    Attributes:
      name: of the fused layer, such as "layers.3.mlp.gate_up_proj".
      members: their names.
      bias: whether they have biases.
    """

    name: str
    members: tuple[str, ...]
    layout: Layout
    bias: bool

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of a layer's parameters."""
        return ("kernel", "bias") if self.bias else ("kernel",)


Groups = tuple[Group, ...]


class _Places(NamedTuple):
    """Where fused parameters are.

    Attributes:
      of: array, layout and number in it, of each parameter by its own name.
      arrays: names of the arrays that hold several.
    """

    of: dict[str, tuple[str, Layout, int]]
    arrays: frozenset[str]


@cache
def _places(groups: Groups) -> _Places:
    of = {
        f"{member}.{leaf}": (f"{group.name}.{leaf}", group.layout, i)
        for group in groups
        for leaf in group.leaves
        for i, member in enumerate(group.members)
    }
    return _Places(of, frozenset(array for array, _, _ in of.values()))


@partial(jax.jit, static_argnums=(1, 2))
def _part(joined: Array, layout: Layout, i: int) -> Array:
    return layout.part(joined, i)


@jax.tree_util.register_pytree_node_class
class FusedParams(Mapping[str, Array]):
    """Parameters by the names of checkpoints, and a pytree of the arrays on the device.

    Looking up a parameter that is fused with others copies it.

    Attributes:
      arrays: by name, with the names of fused layers.
      groups: what is fused.
    """

    def __init__(self, arrays: dict[str, Array], groups: Groups):
        self.arrays, self.groups = arrays, groups

    def __getitem__(self, name: str) -> Array:
        places = _places(self.groups)
        if name in places.of:
            array, layout, i = places.of[name]
            return _part(self.arrays[array], layout, i)
        if name in places.arrays:
            raise KeyError(name)
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        places = _places(self.groups)
        yield from (name for name in self.arrays if name not in places.arrays)
        yield from places.of

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def tree_flatten(self):
        return (self.arrays,), self.groups

    @classmethod
    def tree_unflatten(cls, groups: Groups, children) -> "FusedParams":
        return cls(*children, groups)


Layers = Mapping[str, Sequence[nnx.Module]]  # of each stack, by its dotted name


def joints(layers: Layers) -> Iterator[tuple[str, nnx.Module, str, Joint]]:
    """The name, module, attribute and declaration of every joint."""
    for stack, members in layers.items():
        for number, layer in enumerate(members):
            for path, module in list(nnx.iter_graph(layer)):
                for attribute, joint in _declared(type(module)):
                    name = ".".join([stack, str(number), *map(str, path), attribute])
                    yield name, module, attribute, joint


@cache
def _declared(kind: type) -> list[tuple[str, Joint]]:
    return getmembers_static(kind, lambda value: isinstance(value, Joint))


def fuse_layers(layers: Layers, groups: Groups) -> None:
    """Replace the members of each group by their fused layer."""
    wanted = {group.name: group for group in groups}
    for name, module, attribute, joint in list(joints(layers)) if groups else ():
        if name in wanted:
            linears = [getattr(module, member) for member in joint.names]
            for member in joint.names:
                delattr(module, member)
            setattr(module, attribute, joint.fused(linears, wanted[name].layout))
