"""Parameters as a flat dict of dotted names, and the module that computes with them.

The optimiser, checkpoints and sharding all use this dict. It has two layouts:

* layer by layer, as on disk: "layers.3.mlp.up_proj.kernel";
* stacked for a scan: "layers.blocks.1.mlp.up_proj.kernel", with a leading axis over the layers of
  a block (`infinitevl_jax.nn.stack`).

Parameters outside a block have the same name in both. A model that serves has them layer by layer,
some of them fused (`infinitevl_jax.nn.fused_params`).
"""

import functools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.fused import Joint
from infinitevl_jax.nn.fused_params import FusedParams, Groups, fuse_layers, joints
from infinitevl_jax.nn.initializers import draw
from infinitevl_jax.nn.lora import add_adapters
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.parameter import Facts
from infinitevl_jax.nn.stack import Layout, Scanned, Stack, place_of
from infinitevl_jax.nn.vlm import VLM

Params = dict[str, Array]


@dataclass(frozen=True)
class Parameter:
    """A parameter's shape and facts in one layout.

    Attributes:
      layers: layer-by-layer name of each slice along the leading axis; its own name if not stacked.
      stacked: has a leading axis over layers.
      in_stack: belongs to a layer of a stack.
      facts: facts of a single layer's parameter.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: tuple[str, ...]
    stacked: bool
    in_stack: bool
    facts: Facts

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension."""
        return (None,) * self.stacked + self.facts.axes


def no_remat(layer: Callable) -> Callable:
    """Rematerialise nothing: save all activations for the backward pass."""
    return layer


@dataclass(frozen=True)
class _Abstract:
    """A model without values.

    Attributes:
      paths: flax path of each parameter, by dotted name.
      stacks: layout of each stack, by dotted name.
      joints: layers that may be fused: name of the fused one, names of its members.
        Only layer by layer.
    """

    graphdef: nnx.GraphDef
    paths: Mapping[str, tuple]
    parameters: Mapping[str, Parameter]
    stacks: Mapping[str, Layout]
    joints: Mapping[str, tuple[Joint, tuple[str, ...]]]


@functools.cache
def _abstract(
    config: ModelConfig,
    scanned: Scanned,
    dtype: np.dtype,
    ops: Ops | None,
    remat: Callable,
    groups: Groups,
    lora: LoraConfig | None,
) -> _Abstract:
    if groups and lora:
        raise ValueError("a model whose layers are fused has its adapters merged")

    model = VLM(config, dtype=dtype, ops=ops, scanned=scanned, remat=remat)
    stacks = _stacks(model)
    unrolled = _unrolled(model)
    fuse_layers(unrolled, groups)
    if lora:
        add_adapters(model, stacks, lora)
    graphdef, state = nnx.split(model, nnx.Param)
    paths, parameters = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        name, found = _parameter(path, leaf, stacks)
        paths[name], parameters[name] = path, found
    found = (
        {}
        if scanned
        else {
            name: (joint, tuple(f"{name.rpartition('.')[0]}.{member}" for member in joint.names))
            for name, _, _, joint in joints(unrolled)
        }
    )
    return _Abstract(graphdef, paths, MappingProxyType(parameters), stacks, found)


def _stacks(model: VLM) -> dict[str, Layout]:
    """Layout of each stack, by dotted name."""
    return {
        ".".join(map(str, path)): node.layout
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Stack)
    }


def _unrolled(model: VLM) -> dict[str, list[nnx.Module]]:
    """Layers of each stack that are not scanned, by its dotted name."""
    return {
        ".".join(map(str, path)): list(node.rest)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Stack)
    }


def _parameter(path: tuple, leaf: nnx.Param, stacks: Mapping[str, Layout]) -> tuple[str, Parameter]:
    """Dotted name and description of a flax parameter."""
    value, facts = leaf.get_value(), leaf.get_metadata()["facts"]
    name, layers, stacked, in_stack = place_of(path, stacks)
    return name, Parameter(value.shape, value.dtype, layers, stacked, in_stack, facts)


def parameters(
    config: ModelConfig, *, scanned: Scanned, lora: LoraConfig | None = None
) -> Mapping[str, Parameter]:
    """All parameters of a model by name, in either layout. Dtypes are float32.

    Args:
      lora: adapters beside the model's layers; they are parameters too.
    """
    return _abstract(config, scanned, np.dtype(np.float32), None, no_remat, (), lora).parameters


def functional(
    config: ModelConfig,
    *,
    scanned: Scanned,
    dtype=jnp.float32,
    ops: Ops | None = None,
    remat: Callable = no_remat,
    lora: LoraConfig | None = None,
) -> Callable[[Mapping[str, Array]], VLM]:
    """Return the function that binds parameters to the model.

    Args:
      scanned: layout of the parameters that the function takes. Layer by layer, some may be fused.
      dtype: activation dtype.
      remat: wraps a layer for the backward pass, for example `jax.checkpoint`.
      lora: adapters beside the model's layers.
    """

    def bind(params: Mapping[str, Array]) -> VLM:
        fused = params if isinstance(params, FusedParams) else FusedParams(dict(params), ())
        model = _abstract(config, scanned, np.dtype(dtype), ops, remat, fused.groups, lora)
        tree = [(model.paths[name], nnx.Param(value)) for name, value in fused.arrays.items()]
        return nnx.merge(model.graphdef, nnx.from_flat_state(tree))

    return bind


def stack_layouts(config: ModelConfig, *, scanned: bool) -> Mapping[str, Layout]:
    """Layout of each stack by name."""
    return _abstract(config, scanned, np.dtype(np.float32), None, no_remat, (), None).stacks


def joint_layers(config: ModelConfig) -> Mapping[str, tuple[Joint, tuple[str, ...]]]:
    """Layers that may be fused: by the name of the fused one, how its class declares it and the
    names of its members."""
    return _abstract(config, False, np.dtype(np.float32), None, no_remat, (), None).joints


def cache_spec(config: ModelConfig, batch: int, max_length: int | None, dtype) -> Cache:
    """Shapes and dtypes of a cache.

    Args:
      max_length: largest number of tokens per sequence. Needed only if some layer's state grows
        with the sequence.
      dtype: activation dtype.
    """
    model = _abstract(config, False, np.dtype(dtype), None, no_remat, (), None)
    shapes = {
        path: jax.ShapeDtypeStruct(model.parameters[name].shape, jnp.float32)
        for name, path in model.paths.items()
    }
    tree = nnx.from_flat_state([(path, nnx.Param(shape)) for path, shape in shapes.items()])
    vlm = nnx.merge(model.graphdef, tree)
    return vlm.cache_spec(batch, max_length if vlm.keeps_everything else None)


def unstack(
    config: ModelConfig, params: Params, scanned: Scanned = True, lora: LoraConfig | None = None
) -> Params:
    """Stacked parameters, of the layout `scanned`, -> layer by layer.

    Removes entries from `params` as it goes, so only one stack at a time is in memory twice.
    """
    known, out = parameters(config, scanned=scanned, lora=lora), {}
    for name in list(params):
        value, parameter = params.pop(name), known[name]
        if not parameter.stacked:
            out[name] = value
            continue
        # The gradient of `split` is one concatenation. That of indexing is a zero-padded stack for
        # each layer.
        parts = jax.lax.split(value, [1] * len(parameter.layers))
        out |= {layer: part[0] for layer, part in zip(parameter.layers, parts, strict=True)}
    return out


def initialize(
    config: ModelConfig,
    key: Array,
    *,
    scanned: Scanned,
    dtype=jnp.float32,
    shardings: Mapping[str, NamedSharding] | None = None,
    only: Container[str] | None = None,
) -> Params:
    """Initialise parameters. A parameter has the same values in every layout and on every mesh,
    also where `only` some are created.

    Args:
      key: a typed key of any generator.
      dtype: of the parameters.
      shardings: by name; each device creates its own shards.
      only: names of the parameters to create; None is all.
    """
    known = parameters(config, scanned=scanned)
    wanted = {name: p for name, p in known.items() if only is None or name in only}
    return draw(wanted, key, dtype=dtype, shardings=shardings)
