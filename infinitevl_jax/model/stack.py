"""A stack of layers whose pattern is data, stored so that equal layers can be scanned.

A pattern such as [S, L, L, L] x 9 has period 4 and 9 repeats: `Stack.blocks` then holds 4 modules whose parameters carry a leading
axis of 9. What does not fill a whole period, and everything in the unrolled layout, lives in `Stack.rest` without that axis.
Training scans the blocks (compile time follows the period, not the depth); decoding unrolls (a scan would copy each layer's weights
out of the stack on every token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.model.keys import Keys


@dataclass(frozen=True)
class Layout:
    """Where each of `period * repeats + rest` layers lives."""

    period: int
    repeats: int
    rest: int

    @property
    def depth(self) -> int:
        return self.period * self.repeats + self.rest

    def locate(self, layer: int) -> tuple[tuple[str, int], int | None]:
        """(list name, place in it) of a layer, and its slice along the leading axis (None where there is no such axis)."""
        stacked = self.period * self.repeats
        if layer < stacked:
            return ("blocks", layer % self.period), layer // self.period
        return ("rest", layer - stacked), None


def layout(kinds: Sequence, scanned: bool) -> Layout:
    """The smallest period with at least two repeats; failing that, or unrolled, everything is rest."""
    depth = len(kinds)
    if scanned:
        for period in range(1, depth // 2 + 1):
            repeats = depth // period
            if all(kinds[i] == kinds[i % period] for i in range(depth)):
                return Layout(period, repeats, depth - period * repeats)
    return Layout(0, 0, depth)


class Stack(nnx.Module):
    """Layers `make(kind, keys)` for every kind of the pattern; each is called as `layer(x, state, span) -> (x, state)`."""

    def __init__(self, make: Callable, kinds: Sequence, *, scanned: bool, remat: Callable, keys: Keys):
        self.layout = layout(kinds, scanned)
        self.remat = remat

        def stacked(kind):
            return nnx.vmap(lambda key: make(kind, Keys(key)))(jax.random.split(keys(), self.layout.repeats))

        self.blocks = nnx.List([stacked(kinds[p]) for p in range(self.layout.period)])
        self.rest = nnx.List([make(kinds[self.layout.depth - self.layout.rest + i], keys) for i in range(self.layout.rest)])

    def layers(self) -> list[nnx.Module]:
        """Every layer on its own, in order; a stacked layer is a slice of its block."""
        blocks = [nnx.split(block) for block in self.blocks]
        out = []
        for i in range(self.layout.depth):
            (group, place), repeat = self.layout.locate(i)
            if group == "rest":
                out.append(self.rest[place])
            else:
                graphdef, params = blocks[place]
                out.append(nnx.merge(graphdef, jax.tree.map(lambda p, r=repeat: p[r], params)))
        return out

    def __call__(self, x: Array, span, states: Sequence | None = None, collect: bool = False):
        """Run all layers.

        Args:
          x: [batch, length, width].
          span: what every layer is told about the tokens.
          states: one state a layer, in order, or None (neither states in nor out).
          collect: return the output of every layer as well.

        Returns:
          y [batch, length, width]; the new states (None where there were none); the layers' outputs, a list (empty unless asked for).
        """
        period, repeats, stacked = self.layout.period, self.layout.repeats, self.layout.period * self.layout.repeats
        given = states or [None] * self.layout.depth
        new, outputs = [], []
        if repeats:
            graphdefs, params = zip(*(nnx.split(block) for block in self.blocks), strict=True)
            # The repeats' states stand side by side while the scan runs; outside it each layer has its own, batch first.
            side_by_side = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *given[p:stacked:period]) for p in range(period)]

            def one_period(x, xs):
                ys, after = [], []
                for graphdef, param, state in zip(graphdefs, *xs, strict=True):
                    x, state = self._apply(graphdef, param, x, state, span)
                    ys.append(x)
                    after.append(state)
                return x, (ys if collect else None, after)

            x, (ys, after) = jax.lax.scan(one_period, x, (params, side_by_side))
            new = [jax.tree.map(lambda leaf, r=r: leaf[r], after[p]) for r in range(repeats) for p in range(period)]
            outputs = [y[r] for r in range(repeats) for y in ys] if collect else []
        for layer, state in zip(self.rest, given[stacked:], strict=True):
            x, state = self._apply(*nnx.split(layer), x, state, span)
            new.append(state)
            outputs.append(x)
        return x, tuple(new) if states is not None else None, outputs if collect else []

    def _apply(self, graphdef, params, x, state, span):
        """One layer under the rematerialisation the run asks for."""
        return self.remat(lambda params, x, state: nnx.merge(graphdef, params)(x, state, span))(params, x, state)
