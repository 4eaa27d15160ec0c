"""The state that a run goes on from: a new one, or that of its newest checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from infinitevl_jax.nn.params import Parameter, Params
from infinitevl_jax.processes.group import group
from infinitevl_jax.train.checkpoints import Checkpoints, abstract_state
from infinitevl_jax.train.step import TrainState, init_state, state_shardings


def begin_or_restore(
    checkpoints: Checkpoints,
    begin: Callable[[], Params],
    known: Mapping[str, Parameter],
    names: Sequence[str],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    set_place: Callable[[dict[str, Any]], None],
) -> TrainState:
    """The restored state of the newest checkpoint, or a new one.

    Args:
      begin: creates the parameters of a new one.
      known: all parameters. names: of those that train.
      set_place: receives the data position of a restored checkpoint.
    """
    first = partial(init_state, trainable=list(names), optimizer=optimizer)
    if not group().told(len(checkpoints.steps)):
        params = begin()
        shardings = state_shardings(jax.eval_shape(first, params), known, mesh)
        return jax.jit(first, out_shardings=shardings)(params)
    shapes = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in known.items()}
    wanted = jax.eval_shape(first, shapes)
    places = state_shardings(wanted, known, mesh)
    return checkpoints.restore(abstract_state(wanted, places), set_place)
