"""A stack of layers that can be scanned.

The pattern [S, L, L, L] x 9 has a period of two runs (S and L L L) and 9 repeats. `Stack.blocks`
holds one module per run; its parameters have a leading axis over all layers of that run, here 9 and
27. Layers after the last whole period, and all layers of an unrolled stack, are in `Stack.rest`
without that axis.

Training scans the repeats, so compile time does not depend on the depth. The layers of a repeat are
unrolled: what a scan within them keeps for the backward pass would be copied from stack to stack in
each repeat. Decoding unrolls all: a scan would copy each layer's weights out of the stack for every
token.
"""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.nn.parameter import stacked


@dataclass(frozen=True)
class Layout:
    """Layout of `sum(runs) * repeats + rest` layers.

    Attributes:
      runs: lengths of the runs of identical layers in one period.
      repeats: number of whole periods.
      rest: number of layers after them.
    """

    runs: tuple[int, ...]
    repeats: int
    rest: int

    @property
    def stacked(self) -> int:
        return sum(self.runs) * self.repeats

    @property
    def depth(self) -> int:
        return self.stacked + self.rest

    def members(self, run: int) -> list[int]:
        """The layers of a block, in the order of its leading axis."""
        first, period = sum(self.runs[:run]), sum(self.runs)
        return [
            repeat * period + first + i
            for repeat in range(self.repeats)
            for i in range(self.runs[run])
        ]

    def places(self) -> list[tuple[str, int, int | None]]:
        """For each layer: list name, position in it, index along the leading axis or None."""
        found = {
            layer: ("blocks", run, i)
            for run in range(len(self.runs))
            for i, layer in enumerate(self.members(run))
        }
        found |= {self.stacked + i: ("rest", i, None) for i in range(self.rest)}
        return [found[layer] for layer in range(self.depth)]


# Which layers are stacked: none (False), equal ones (True), or equal ones with equal labels, of
# which there is one for each layer. Models with the same labels have the same layout.
Scanned = bool | tuple[str, ...]


def layout(kinds: Sequence, scanned: Scanned) -> Layout:
    """The shortest period that repeats; if there is none or `scanned` is false, all is rest."""
    depth = len(kinds)
    if isinstance(scanned, tuple):
        kinds = list(zip(kinds, scanned, strict=True))
    if scanned:
        for period in range(1, depth // 2 + 1):
            repeats = depth // period
            if all(kinds[i] == kinds[i % period] for i in range(depth)):
                runs = tuple(len(list(equal)) for _, equal in itertools.groupby(kinds[:period]))
                return Layout(runs, repeats, depth - period * repeats)
    return Layout((), 0, depth)


class Place(NamedTuple):
    """What a node of a model is called.

    Attributes:
      name: its dotted name.
      layers: layer-by-layer name of each slice along the leading axis; its own name if not stacked.
      stacked: its parameters have a leading axis over layers.
      in_stack: belongs to a layer of a stack.
    """

    name: str
    layers: tuple[str, ...]
    stacked: bool
    in_stack: bool


def place_of(path: tuple, stacks: Mapping[str, Layout]) -> Place:
    """The names of a module or parameter inside a layer, from its flax path.

    Args:
      stacks: layout of each stack of the model, by dotted name.
    """
    for stack, layout in stacks.items():
        depth = stack.count(".") + 1
        if ".".join(map(str, path[:depth])) == stack:
            group, place, tail = path[depth], int(path[depth + 1]), path[depth + 2 :]
            layers = layout.members(place) if group == "blocks" else [layout.stacked + place]
            names = tuple(".".join([stack, str(layer), *map(str, tail)]) for layer in layers)
            stacked = group == "blocks"
            return Place(".".join(map(str, path)) if stacked else names[0], names, stacked, True)
    name = ".".join(map(str, path))
    return Place(name, (name,), False, False)


class Stack(nnx.Module):
    """Layers `make(kind)`, one per kind, called as `layer(x, state, info) -> (x, state)`
    unless the caller names another method of theirs."""

    def __init__(self, make: Callable, kinds: Sequence, *, scanned: Scanned, remat: Callable):
        self.layout = layout(kinds, scanned)
        self.remat = remat

        def block(run: int) -> nnx.Module:
            members = self.layout.members(run)
            graphdef, params = nnx.split(make(kinds[members[0]]))
            return nnx.merge(graphdef, stacked(params, len(members)))

        self.blocks = nnx.List([block(run) for run in range(len(self.layout.runs))])
        self.rest = nnx.List([make(kind) for kind in kinds[self.layout.stacked :]])

    def layers(self) -> list[nnx.Module]:
        """All layers in order, unstacked."""
        blocks = [nnx.split(block) for block in self.blocks]
        out = []
        for group, place, index in self.layout.places():
            if group == "rest":
                out.append(self.rest[place])
            else:
                graphdef, params = blocks[place]
                out.append(nnx.merge(graphdef, jax.tree.map(lambda p, i=index: p[i], params)))
        return out

    def __call__(
        self,
        x: Array,
        info,
        states: Sequence | None = None,
        collect: bool = False,
        method: Callable = operator.call,
    ):
        """Run all layers.

        Args:
          x: [batch, length, width].
          info: token metadata for all layers.
          states: one state per layer in order, or None.
          collect: also return the output of every layer.
          method: runs a layer, `method(layer, x, state, info) -> (x, state)`.

        Returns:
          y: [batch, length, width].
          states: the new states; None if `states` was None.
          outputs: the layers' outputs; empty unless `collect`.
        """
        return run_stacks([self], x, info, states, collect, method, self.remat)


def run_stacks(
    stacks: Sequence[Stack],
    x: Array,
    info,
    states: Sequence | None = None,
    collect: bool = False,
    method: Callable = operator.call,
    remat: Callable = lambda layer: layer,
):
    """Run the layers of stacks of the same layout side by side, as `Stack` does.

    Args:
      method: `method(*layers, x, state, info) -> (x, state)` runs the layers of one depth, one of
        each stack. The state that it returns may have another structure than the one it takes.
      remat: rematerialisation of `method`.
    """
    layout = stacks[0].layout
    if any(stack.layout != layout for stack in stacks):
        raise ValueError("stacks of different layouts do not run side by side")
    given = states or [None] * layout.depth
    new, outputs = [None] * layout.stacked, [None] * layout.stacked

    # Equal layers, also those of an unrolled stack, are traced and lowered once.
    @partial(jax.jit, static_argnums=0)
    def apply(graphdefs, params, x, state):
        """Run the layers of one depth with rematerialisation."""

        def run(params, x, state):
            layers = map(nnx.merge, graphdefs, params)
            return method(*layers, x, state, info)

        return remat(run)(params, x, state)

    def split(leaf, run):
        """The leading axis of a block as [repeats, layers of the run]."""
        return leaf.reshape(layout.repeats, layout.runs[run], *leaf.shape[1:])

    if layout.repeats:
        runs = [
            [nnx.split(stack.blocks[run]) for stack in stacks] for run in range(len(layout.runs))
        ]
        graphdefs = [tuple(graphdef for graphdef, _ in run) for run in runs]
        params = [[state for _, state in run] for run in runs]
        # Stack the states of a block for the scan; outside it each layer has its own.
        side_by_side = [
            jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(given[i] for i in layout.members(run))
            )
            for run in range(len(layout.runs))
        ]
        blocks = [
            jax.tree.map(partial(split, run=run), block)
            for run, block in enumerate(zip(params, side_by_side, strict=True))
        ]

        def one_period(x, blocks):
            def one_layer(x, block, graphdef):
                x, state = apply(graphdef, block[0], x, block[1])
                return x, (x if collect else None, state)

            after = []
            for graphdef, block in zip(graphdefs, blocks, strict=True):
                run = partial(one_layer, graphdef=graphdef)
                x, found = jax.lax.scan(run, x, block, unroll=True)
                after.append(found)
            return x, after

        x, after = jax.lax.scan(one_period, x, blocks)
        for run, (ys, run_states) in enumerate(after):
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (ys, run_states))
            for i, layer in enumerate(layout.members(run)):
                outputs[layer], new[layer] = jax.tree.map(lambda leaf, i=i: leaf[i], flat)
    for *layers, state in zip(
        *(stack.rest for stack in stacks), given[layout.stacked :], strict=True
    ):
        graphdef, params = zip(*(nnx.split(layer) for layer in layers), strict=True)
        x, state = apply(graphdef, params, x, state)
        new.append(state)
        outputs.append(x)
    return x, tuple(new) if states is not None else None, outputs if collect else []
