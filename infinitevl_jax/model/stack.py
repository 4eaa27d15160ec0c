"""A stack of layers whose pattern is data, stored so that equal layers can be scanned.

A pattern such as [S, L, L, L] x 9 has period 4 and 9 repeats: `Stack.blocks` then holds 4 modules whose parameters carry a leading
axis of 9. What does not fill a whole period, and everything in the unrolled layout, lives in `Stack.rest` without that axis.
Training scans the blocks (compile time follows the period, not the depth); decoding unrolls (a scan would copy each layer's weights
out of the stack on every token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
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
          states: one state a layer (decoding, chunked prefill), or None (training: no state in or out).
          collect: return the output of every layer as well.

        Returns:
          y [batch, length, width]; the new states (None where there were none); the layers' outputs, a list (empty unless asked for).
        """
        if states is not None:
            new, outputs = [], []
            for layer, state in zip(self.layers(), states, strict=True):
                x, state = layer(x, state, span)
                new.append(state)
                outputs.append(x)
            return x, tuple(new), outputs if collect else []

        outputs = []
        if self.layout.repeats:
            graphdefs, params = zip(*(nnx.split(block) for block in self.blocks), strict=True)

            def period(x, params):
                ys = []
                for graphdef, param in zip(graphdefs, params, strict=True):
                    x = self._apply(graphdef, param, x, span)
                    ys.append(x)
                return x, tuple(ys) if collect else None

            x, ys = jax.lax.scan(period, x, params)
            if collect:
                outputs = [y[r] for r in range(self.layout.repeats) for y in ys]
        for layer in self.rest:
            x = self._apply(*nnx.split(layer), x, span)
            outputs.append(x)
        return x, None, outputs if collect else []

    def _apply(self, graphdef, params, x, span):
        """One layer without state, under the rematerialisation the run asks for."""
        return self.remat(lambda params, x: nnx.merge(graphdef, params)(x, None, span)[0])(params, x)
