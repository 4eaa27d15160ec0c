"""Operators and token steps on 8 devices equal those on one: values and gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_steps

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh, operator_mesh
from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention import step as attention_step
from pallas_kernels.attention.partition import partition_attention, partition_attention_step
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.gated_delta_rule.partition import (
    partition_gated_delta_rule,
    partition_gated_delta_rule_step,
)
from pallas_kernels.projection.partition import partition_projection
from pallas_kernels.projection.xla import projection
from pallas_kernels.testing.cases import (
    attention_step_case,
    gated_delta_rule_step_case,
    projection_case,
)
from pallas_kernels.testing.parity import packing, padding, rel_rms, unit, with_gradients

MESHES = {
    "data 2, fsdp 2, tensor 2": RunConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, tensor 4, more than key heads": RunConfig(fsdp=2, tensor=4),
    "fsdp 8, more than rows": RunConfig(fsdp=8),
}
TOKEN = [3, -1, 20, 8]  # token indices


def compare(function, spread, inputs, cotangents, others, **rule):
    whole = jax.tree.leaves(with_gradients(partial(function, **rule))(inputs, cotangents, others))
    for name, run in MESHES.items():
        sharded = with_gradients(partial(spread(function, operator_mesh(make_mesh(run))), **rule))
        for a, b in zip(jax.tree.leaves(sharded(inputs, cotangents, others)), whole, strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(np.isfinite(a), finite, err_msg=name)
            assert rel_rms(a[finite], b[finite]) <= 1e-6, name


def compare_step(step, spread, case):
    """Compare all copies of replicated data, because each device writes its own ring."""
    arguments, rule = token_steps.first_token(case)
    whole = jax.jit(partial(step, **rule))(*arguments)
    for name, run in MESHES.items():
        sharded = jax.jit(partial(spread(step, operator_mesh(make_mesh(run))), **rule))(*arguments)
        for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
            for part in a.addressable_shards:
                assert rel_rms(part.data, b[part.index]) <= 1e-6, name


def moved(lowered):
    """Collectives of a compiled program."""
    text = lowered.compile().as_text()
    return [
        line
        for line in text.splitlines()
        if re.search("= .*(all-gather|all-to-all|collective-permute|all-reduce)", line)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed):
    rng = np.random.default_rng(0)
    batch, length = 4, 40
    q, d_out = (np.float32(rng.normal(size=(batch, length, 8, 16))) for _ in range(2))
    k, v = (np.float32(rng.normal(size=(batch, length, 2, 16))) for _ in range(2))
    token_index, segment_ids = padding([40, 3, 0, 17], length), None
    if packed:
        token_index, segment_ids = (np.tile(x, (batch, 1)) for x in packing([17, 3, 15], length))
    tokens = {
        "q_token_index": token_index,
        "k_token_index": token_index,
        "q_segment_ids": segment_ids,
        "k_segment_ids": segment_ids,
    }
    cotangents = d_out, np.float32(rng.normal(size=(batch, length, 8)))
    compare(
        attention,
        partition_attention,
        (q, k, v),
        cotangents,
        tokens,
        mask=Mask(window=9, aligned=True),
        scale=0.25,
    )


def test_gated_delta_rule():
    rng = np.random.default_rng(0)
    lead = 4, 70, 4
    inputs = (
        unit(rng, (*lead, 8)),
        unit(rng, (*lead, 8)),
        rng.normal(size=(*lead, 16)),
        -rng.random(lead),
        rng.random(lead),
    )
    inputs = tuple(np.float32(x) for x in (*inputs, rng.normal(size=(4, 4, 8, 16))))
    cotangents = (
        np.float32(rng.normal(size=(*lead, 16))),
        np.float32(rng.normal(size=(4, 4, 8, 16))),
    )
    token_index, segment_ids = (np.tile(x, (4, 1)) for x in packing([37, 2, 25], 70))
    compare(
        gated_delta_rule,
        partition_gated_delta_rule,
        inputs,
        cotangents,
        {"token_index": token_index, "segment_ids": segment_ids},
    )
    compare(gated_delta_rule, partition_gated_delta_rule, inputs[:5], cotangents, {})


@pytest.mark.parametrize("heads", [(8, 2), (6, 3)], ids=str)
def test_attention_step(heads):
    """8 heads on 2: with 4 shards, two share a key head. 6 on 3: 2 shards would split a group."""
    case = attention_step_case("", [TOKEN], heads, 16, capacity=8, window=5)
    compare_step(attention_step.step, partition_attention_step, case)


def test_gated_delta_step():
    compare_step(
        delta_step.step,
        partition_gated_delta_rule_step,
        gated_delta_rule_step_case("", [TOKEN], heads=4, keys=8, values=16),
    )


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_projection(gated, transposed):
    problem = projection_case(
        "", 4, 24, 16, gated, transposed, bias=True, residual=True, norm=True
    ).make()
    inputs = [np.float32(x) for x in problem.inputs.values() if x is not None]
    cotangent = np.float32(np.random.default_rng(1).standard_normal((4, 16)))

    def in_a_tuple(run):
        return lambda *args, **rule: (run(*args, **rule),)

    def spread(run, mesh):
        return in_a_tuple(partition_projection(lambda **call: run(**call)[0], mesh))

    compare(in_a_tuple(projection), spread, inputs, (cotangent,), {}, **problem.rule)


@pytest.mark.parametrize(("outputs", "gathers"), [(16, False), (15, True)])
def test_a_matrix_split_by_columns_is_not_gathered(outputs, gathers):
    """15 columns are not split: then each device has all of them."""
    mesh = make_mesh(RunConfig(fsdp=2, tensor=4))
    run = partition_projection(projection, operator_mesh(mesh))

    def placed(shape, *spec):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    x = placed((4, 24), "fsdp", None)
    weight = placed((24, 2, outputs), *((None, None, "tensor") if outputs == 16 else ("tensor",)))
    assert bool(moved(jax.jit(run).lower(x, weight, norm=placed((24,))))) == gathers


def test_a_mesh_of_one_axis():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k = np.ones((8, 5, 4, 8), np.float32), np.ones((8, 5, 2, 8), np.float32)
    token_index = np.tile(np.arange(5, dtype=np.int32), (8, 1))
    arguments = q, k, k, token_index, token_index, None, None, Mask(aligned=True), 1.0
    ours, wanted = (
        jax.jit(run, static_argnums=(7, 8))(*arguments)
        for run in (partition_attention(attention, operator_mesh(mesh)), attention)
    )
    np.testing.assert_allclose(ours[0], wanted[0])


def test_nothing_is_gathered():
    """No collectives except for the gradient of key heads that shards share."""
    mesh = make_mesh(RunConfig(data=2, fsdp=2, tensor=2))
    sharded = partition_attention(attention, operator_mesh(mesh))
    place = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor", None)
    )
    q, k = (jax.ShapeDtypeStruct((4, 64, n, 16), jnp.float32, sharding=place) for n in (8, 2))
    token_index = jnp.tile(jnp.arange(64), (4, 1))

    def gradients(q, k, v):
        rest = token_index, token_index, None, None, Mask(window=9, aligned=True), 0.25
        return jax.grad(lambda *a: sharded(*a, *rest)[0].sum(), (0, 1, 2))(q, k, v)

    assert not moved(jax.jit(gradients, out_shardings=place).lower(q, k, k))


def test_nothing_of_an_attention_step_is_gathered():
    """Also where shards share key heads: each replicates the ring."""
    arrays, rule = token_steps.first_token(attention_step_case("", [TOKEN], (8, 2), 16, capacity=8))
    for run in (RunConfig(data=2, fsdp=2, tensor=2), RunConfig(fsdp=2, tensor=4)):
        mesh = make_mesh(run)
        step = partial(partition_attention_step(attention_step.step, operator_mesh(mesh)), **rule)
        assert not moved(
            jax.jit(step).lower(*token_steps.placed(arrays, token_steps.ATTENTION, mesh))
        )


def test_nothing_of_a_gated_delta_step_is_gathered():
    arrays, rule = token_steps.first_token(
        gated_delta_rule_step_case("", [TOKEN], heads=4, keys=8, values=16)
    )
    mesh = make_mesh(RunConfig(data=2, fsdp=2, tensor=2))
    step = partial(partition_gated_delta_rule_step(delta_step.step, operator_mesh(mesh)), **rule)
    assert not moved(jax.jit(step).lower(*token_steps.placed(arrays, token_steps.DELTA, mesh)))
