"""Parameters as one flat dict of dotted names, and the module that computes with them.

Optimiser, checkpoints, sharding and conversion all work on the dict; only `bind` knows that flax
has a tree of its own.
"""

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rngs import Rngs
from infinitevl_jax.nn.stack import Layout, layout
from infinitevl_jax.nn.towers.qwen2_5_vl import block_kinds
from infinitevl_jax.nn.vlm import VLM

Params = dict[str, Array]


def flatten(state: nnx.State) -> Params:
    """nnx state -> {"layers.rest.0.mlp.up_proj.kernel": array, ...}."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def no_remat(layer: Callable) -> Callable:
    """Keep every activation for the backward pass."""
    return layer


@functools.cache
def abstract(
    config: ModelConfig,
    *,
    scanned: bool,
    dtype=jnp.float32,
    ops: Ops | None = None,
    remat: Callable = no_remat,
) -> tuple[nnx.GraphDef, Mapping[str, jax.ShapeDtypeStruct]]:
    """The model without its numbers: the graph definition that `bind` takes, and every parameter's
    name and shape (f32)."""
    model = nnx.eval_shape(
        lambda: VLM(
            config, dtype=dtype, ops=ops, scanned=scanned, remat=remat, rngs=Rngs(jax.random.key(0))
        )
    )
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, MappingProxyType(
        {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    )


def bind(graphdef: nnx.GraphDef, params: Mapping[str, Array]) -> VLM:
    """The module that computes with these parameters."""
    tree = [
        (tuple(int(p) if p.isdigit() else p for p in name.split(".")), nnx.Param(value))
        for name, value in params.items()
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(tree))


# stack, group, place in the group, the rest of a parameter's name
STACKED = re.compile(r"(layers|visual\.blocks)\.(blocks|rest)\.(\d+)\.(.+)")


def stack_layouts(config: ModelConfig, *, scanned: bool) -> dict[str, Layout]:
    """Where the layers of each stack live, by the stack's name."""
    kinds = {"layers": config.text.layer_types} | (
        {"visual.blocks": block_kinds(config.vision)} if config.vision is not None else {}
    )
    return {name: layout(kind, scanned) for name, kind in kinds.items()}


def unstack(config: ModelConfig, params: Params) -> Params:
    """Parameters of the scanned layout -> the unrolled one. Empties `params` on its way: one stack
    at a time is held more than once."""
    layouts = stack_layouts(config, scanned=True)
    out = {}
    for name in list(params):
        value = params.pop(name)
        match = STACKED.fullmatch(name)
        if match is None:
            out[name] = value
            continue
        stack, group, place, leaf = match.groups()
        where = layouts[stack]
        if group == "rest":
            out[f"{stack}.rest.{where.stacked + int(place)}.{leaf}"] = value
        else:
            members = where.members(int(place))
            # one operation, whose gradient is one concatenation; that of a slice is a whole stack
            # of zeros around it
            for layer, part in zip(members, jax.lax.split(value, [1] * len(members)), strict=True):
                out[f"{stack}.rest.{layer}.{leaf}"] = part[0]
    return out


def initialize(
    config: ModelConfig, key: Array, *, scanned: bool, dtype=jnp.float32, shardings=None
) -> Params:
    """Fresh parameters in `dtype`, the same numbers in both layouts.

    shardings: by name in the scanned layout; each device then makes only its part.
    """

    def create(key):
        params = flatten(nnx.state(VLM(config, scanned=True, rngs=Rngs(key)), nnx.Param))
        return {name: p.astype(dtype) for name, p in params.items()}

    params = jax.jit(create, out_shardings=shardings)(key)
    return params if scanned else unstack(config, params)
