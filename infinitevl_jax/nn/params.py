"""A model's parameters as one flat dict of dotted names, and the modules that compute with them.

Optimiser, checkpoints and sharding all work on the dict. There are two layouts of it:

* layer by layer, as on disk: "layers.3.mlp.up_proj.kernel";
* stacked for a scan: "layers.blocks.1.mlp.up_proj.kernel", with a leading axis over the layers of
  a block (`infinitevl_jax.nn.stack`); what is in no block has the same name in both.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.parameter import Facts
from infinitevl_jax.nn.rngs import Rngs
from infinitevl_jax.nn.stack import Layout, Stack
from infinitevl_jax.nn.vlm import VLM

Params = dict[str, Array]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, in one layout.

    Attributes:
      layers: its names layer by layer: of each slice along the leading axis, or its own name.
      stacked: whether it has that axis.
      in_stack: whether it belongs to a layer of a stack.
      facts: of one layer's parameter.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: tuple[str, ...]
    stacked: bool
    in_stack: bool
    facts: Facts

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical axis of each dimension."""
        return (None,) * self.stacked + self.facts.axes


def no_remat(layer: Callable) -> Callable:
    """Keep every activation for the backward pass."""
    return layer


@dataclass(frozen=True)
class _Abstract:
    """A model without its numbers.

    paths: flax's own path of each parameter, by our name. stacks: by dotted name.
    """

    graphdef: nnx.GraphDef
    paths: Mapping[str, tuple]
    parameters: Mapping[str, Parameter]
    stacks: Mapping[str, Layout]


@functools.cache
def _abstract(
    config: ModelConfig, scanned: bool, dtype: np.dtype, ops: Ops | None, remat: Callable
) -> _Abstract:
    def make():
        rngs = Rngs(jax.random.key(0))
        return VLM(config, dtype=dtype, ops=ops, scanned=scanned, remat=remat, rngs=rngs)

    model = nnx.eval_shape(make)
    stacks = {
        ".".join(map(str, path)): node.layout
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Stack)
    }
    graphdef, state = nnx.split(model, nnx.Param)
    paths, parameters = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        name, found = _parameter(path, leaf, stacks)
        paths[name], parameters[name] = path, found
    return _Abstract(graphdef, paths, MappingProxyType(parameters), stacks)


def _parameter(path: tuple, leaf: nnx.Param, stacks: Mapping[str, Layout]) -> tuple[str, Parameter]:
    """Our name of a flax parameter, and the parameter."""
    value, facts = leaf.get_value(), leaf.get_metadata()["facts"]
    for stack, layout in stacks.items():
        depth = stack.count(".") + 1
        if ".".join(map(str, path[:depth])) == stack:
            group, place, tail = path[depth], int(path[depth + 1]), path[depth + 2 :]
            layers = layout.members(place) if group == "blocks" else [layout.stacked + place]
            names = tuple(".".join([stack, str(layer), *map(str, tail)]) for layer in layers)
            stacked = group == "blocks"
            name = ".".join(map(str, path)) if stacked else names[0]
            return name, Parameter(value.shape, value.dtype, names, stacked, True, facts)
    name = ".".join(map(str, path))
    return name, Parameter(value.shape, value.dtype, (name,), False, False, facts)


def parameters(config: ModelConfig, *, scanned: bool) -> Mapping[str, Parameter]:
    """Every parameter of a model by name, in either layout; shapes of fresh ones, in float32."""
    return _abstract(config, scanned, np.dtype(np.float32), None, no_remat).parameters


def functional(
    config: ModelConfig,
    *,
    scanned: bool,
    dtype=jnp.float32,
    ops: Ops | None = None,
    remat: Callable = no_remat,
) -> Callable[[Mapping[str, Array]], VLM]:
    """The function from parameters, in the layout that `scanned` says, to the module that computes
    with them.

    Args:
      dtype: what activations are computed in.
      remat: wraps a layer for the backward pass, such as jax.checkpoint.
    """
    model = _abstract(config, scanned, np.dtype(dtype), ops, remat)

    def bind(params: Mapping[str, Array]) -> VLM:
        tree = [(model.paths[name], nnx.Param(value)) for name, value in params.items()]
        return nnx.merge(model.graphdef, nnx.from_flat_state(tree))

    return bind


def stack_layouts(config: ModelConfig, *, scanned: bool) -> Mapping[str, Layout]:
    """Where the layers of each stack live, by the stack's name."""
    return _abstract(config, scanned, np.dtype(np.float32), None, no_remat).stacks


def cache_spec(config: ModelConfig, batch: int, max_length: int | None, dtype) -> Cache:
    """Shapes of a cache: all that is known of its size.

    Args:
      max_length: the most tokens of a sequence. Models of which every layer's state has a fixed
        size take any number, and None.
      dtype: of activations.
    """
    model = _abstract(config, False, np.dtype(dtype), None, no_remat)
    shapes = {
        path: jax.ShapeDtypeStruct(model.parameters[name].shape, jnp.float32)
        for name, path in model.paths.items()
    }
    tree = nnx.from_flat_state([(path, nnx.Param(shape)) for path, shape in shapes.items()])
    return nnx.merge(model.graphdef, tree).cache_spec(batch, max_length)


def unstack(config: ModelConfig, params: Params) -> Params:
    """Stacked parameters -> layer by layer.

    Empties `params` on its way, so that one stack at a time is held twice.
    """
    known, out = parameters(config, scanned=True), {}
    for name in list(params):
        value, parameter = params.pop(name), known[name]
        if not parameter.stacked:
            out[name] = value
            continue
        # one operation, whose gradient is one concatenation; that of a slice is a whole stack of
        # zeros around it
        parts = jax.lax.split(value, [1] * len(parameter.layers))
        out |= {layer: part[0] for layer, part in zip(parameter.layers, parts, strict=True)}
    return out


def stack(config: ModelConfig, params: Params) -> Params:
    """Parameters layer by layer -> stacked. Empties `params` on its way."""
    out = {}
    for name, parameter in parameters(config, scanned=True).items():
        parts = [params.pop(layer) for layer in parameter.layers]
        out[name] = jnp.stack(parts) if parameter.stacked else parts[0]
    return out


def initialize(
    config: ModelConfig, key: Array, *, scanned: bool, dtype=jnp.float32, shardings=None
) -> Params:
    """Fresh parameters in `dtype`, the same numbers in both layouts.

    shardings: by name in the stacked layout; each device then makes only its part.
    """
    names = {path: name for name, path in _stacked_paths(config).items()}

    def create(key):
        state = nnx.state(VLM(config, scanned=True, rngs=Rngs(key)), nnx.Param)
        return {names[path]: leaf[...].astype(dtype) for path, leaf in nnx.to_flat_state(state)}

    params = jax.jit(create, out_shardings=shardings)(key)
    return params if scanned else unstack(config, params)


def _stacked_paths(config: ModelConfig) -> Mapping[str, tuple]:
    return _abstract(config, True, np.dtype(np.float32), None, no_remat).paths
