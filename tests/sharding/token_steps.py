"""Arguments of token steps and their shardings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from infinitevl_jax.sharding import spec
from pallas_kernels.attention import KVCache
from pallas_kernels.gated_delta_rule import DeltaState
from pallas_kernels.gated_delta_rule.api import Inputs, Weights

HEADS, CONV_STATES, TAPS = ("batch", "heads", None), ("batch", None, "heads"), (None, "heads")
CACHE = ("batch", None, "heads", None)
# logical axes of all arrays
ATTENTION = (HEADS, HEADS, HEADS, KVCache(CACHE, CACHE), ("batch",))
DELTA = (
    Inputs(*[("batch", "heads")] * 6),
    Weights(TAPS, TAPS, TAPS, A_log=("heads",), dt_bias=("heads",), norm=(None,)),
    DeltaState(("batch", "heads", None, None), CONV_STATES, CONV_STATES, CONV_STATES),
    ("batch",),
)


def first_token(case, dtype=jnp.float32):
    """Arrays of a case's first token, and the rule. Float64 arrays become `dtype`."""
    problem = case.make()
    inputs, weights, state = problem.inputs.values()
    arrays = (
        *jax.tree.map(lambda x: x[0], inputs),
        *weights,
        state,
        problem.tokens["token_index"][0],
    )
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if x.dtype == np.float64 else x.dtype), arrays
    ), problem.rule


def placed(arrays, axes, mesh):
    """Shapes of the arrays with their shardings."""

    def place(x, axes):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec(axes, x.shape, mesh))
        )

    return jax.tree.map(place, arrays, axes)
