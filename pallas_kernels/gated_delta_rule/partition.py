"""The gated delta rule and its one-token step on a mesh: rows over the batch axes, heads over
the head axes."""

from collections.abc import Callable
from functools import partial

from jax.sharding import PartitionSpec

from pallas_kernels.columns import values
from pallas_kernels.gated_delta_rule.api import Inputs, Weights, arguments, step_arguments
from pallas_kernels.gated_delta_rule.state import DeltaState
from pallas_kernels.partition import OperatorMesh


def partition_gated_delta_rule(gated_delta_rule: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `gated_delta_rule` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = arguments(*args, **kwargs)
        batch, split = (
            mesh.rows(call["q"].shape[0]),
            mesh.heads(call["k"].shape[2], call["v"].shape[2]),
        )
        heads, gates = PartitionSpec(batch, None, split, None), PartitionSpec(batch, None, split)
        rows, state = PartitionSpec(batch, None), PartitionSpec(batch, split, None, None)
        specs = heads, heads, heads, gates, gates, state, rows, rows
        given = {name: (x, spec) for (name, x), spec in zip(call.items(), specs, strict=True)}
        return mesh.run(gated_delta_rule, given, (heads, state))

    return run


def partition_gated_delta_rule_step(step: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `gated_delta_rule_step` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = step_arguments(*args, **kwargs)
        state, inputs = call["state"], values(call["inputs"])
        value_heads, width = state.recurrent_state.shape[1:3]
        batch, heads = mesh.rows(len(inputs.q)), mesh.heads(inputs.q.shape[1] // width, value_heads)
        channels, conv_states = PartitionSpec(batch, heads), PartitionSpec(batch, None, heads)
        taps, numbers = PartitionSpec(None, heads), PartitionSpec(heads)
        states = DeltaState(
            PartitionSpec(batch, heads, None, None), conv_states, conv_states, conv_states
        )
        weights = Weights(
            taps, taps, taps, A_log=numbers, dt_bias=numbers, norm=PartitionSpec(None)
        )
        specs = Inputs(*[channels] * len(inputs)), weights, states, PartitionSpec(batch)
        run_local = mesh.shard_map(partial(step, eps=call["eps"]), specs, (channels, states))
        return run_local(inputs, call["weights"], state, call["token_index"])

    return run
