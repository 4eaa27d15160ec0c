"""Hopper kernels on meshes of 8 devices: lowered for CUDA, and dense replacements run on CPU.

The kernels' arithmetic is interpreted on one device
(tests/pallas_kernels/test_mosaic_gpu_interpreted.py).
"""

import re
from functools import partial

import dense_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_steps
from jax.sharding import NamedSharding, PartitionSpec

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh, operator_mesh
from pallas_kernels.attention import Mask
from pallas_kernels.attention.hopper import attention as attention_hopper
from pallas_kernels.attention.hopper import step as attention_step_hopper
from pallas_kernels.attention.partition import partition_attention, partition_attention_step
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as delta_hopper
from pallas_kernels.gated_delta_rule.hopper import step as delta_step_hopper
from pallas_kernels.gated_delta_rule.partition import (
    partition_gated_delta_rule,
    partition_gated_delta_rule_step,
)
from pallas_kernels.short_conv.hopper import short_conv as conv_hopper
from pallas_kernels.short_conv.partition import partition_short_conv
from pallas_kernels.testing.cases import attention_step_case, gated_delta_rule_step_case
from pallas_kernels.testing.parity import (
    GATES,
    packing,
    padding,
    poison,
    rel_rms,
    unit,
    with_gradients,
)

MESHES = (
    RunConfig(data=2, fsdp=2, tensor=2),
    RunConfig(fsdp=2, tensor=4),
)  # the second with more shards than key heads
LENGTH = 70
MOVES = r"stablehlo\.(all_gather|all_reduce|all_to_all|reduce_scatter|collective_\w+)"


def tokens():
    """Token indices and segment ids of packed rows, a full row and an empty row."""
    packed = packing([17, 3, 40], LENGTH), packing([66, 2], LENGTH)
    token_index, segment_ids = (np.concatenate(x) for x in zip(*packed, strict=True))
    alone = padding([LENGTH, 0], LENGTH)
    return np.concatenate([token_index, alone]), np.concatenate([segment_ids, np.zeros_like(alone)])


def attention_case():
    rng = np.random.default_rng(0)
    token_index, segment_ids = tokens()
    q, d_out = (rng.normal(size=(*token_index.shape, 8, 128)) for _ in range(2))
    k, v = (rng.normal(size=(*token_index.shape, 2, 128)) for _ in range(2))
    inputs = [jnp.asarray(poison(x, token_index), jnp.bfloat16) for x in (q, k, v)]
    cotangents = (
        jnp.asarray(d_out, jnp.bfloat16),
        np.float32(rng.normal(size=(*token_index.shape, 8))),
    )
    everyone = {
        "q_token_index": token_index,
        "k_token_index": token_index,
        "q_segment_ids": segment_ids,
        "k_segment_ids": segment_ids,
    }
    return (
        attention_hopper.attention,
        partition_attention,
        inputs,
        cotangents,
        everyone,
        {"mask": Mask(window=9, aligned=True), "scale": 0.1},
    )


def delta_case():
    rng = np.random.default_rng(0)
    token_index, segment_ids = tokens()
    lead = (*token_index.shape, 4)
    wide = [
        poison(x, token_index)
        for x in (unit(rng, (*lead, 128)), unit(rng, (*lead, 128)), rng.normal(size=(*lead, 64)))
    ]
    rest = (
        poison(GATES["mild"](rng, lead), token_index),
        poison(rng.random(lead), token_index),
        rng.normal(size=(4, 4, 128, 64)),
    )
    inputs = [*(jnp.asarray(x, jnp.bfloat16) for x in wide), *map(np.float32, rest)]
    cotangents = (
        jnp.asarray(rng.normal(size=(*lead, 64)), jnp.bfloat16),
        np.float32(rng.normal(size=(4, 4, 128, 64))),
    )
    return (
        delta_hopper.gated_delta_rule,
        partition_gated_delta_rule,
        inputs,
        cotangents,
        {"token_index": token_index, "segment_ids": segment_ids},
        {},
    )


OPERATORS = "attention", "gated_delta_rule"


@pytest.mark.parametrize(
    ("case", "meshes"), [(attention_case, MESHES), (delta_case, MESHES[:1])], ids=OPERATORS
)
def test_frame(case, meshes, monkeypatch):
    dense_kernels.replace(monkeypatch)
    function, spread, inputs, cotangents, tokens, rule = case()
    whole = with_gradients(partial(function, **rule))(inputs, cotangents, tokens)
    for run in meshes:
        parts = with_gradients(partial(spread(function, operator_mesh(make_mesh(run))), **rule))(
            inputs, cotangents, tokens
        )
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            allowed = (
                1e-6 if a.dtype == np.float32 else 1e-4
            )  # in bfloat16 a few numbers are rounded the other way
            if a.ndim == 4 and a.shape[2] < run.tensor:
                # gradients of keys that shards share are sums of bfloat16 parts
                allowed = 4e-3
            assert rel_rms(a[finite], b[finite]) <= allowed


@pytest.mark.parametrize(("case", "kernels"), [(attention_case, 2), (delta_case, 4)], ids=OPERATORS)
def test_lowers_for_cuda(case, kernels):
    """Each kernel appears once, on local rows and heads, without communication."""
    function, spread, inputs, _, tokens, rule = case()
    mesh = make_mesh(MESHES[0])
    sharded = partial(spread(function, operator_mesh(mesh)), **rule)

    def place(x, heads=None):
        split = PartitionSpec(
            ("data", "fsdp"), *("tensor" if axis == heads else None for axis in range(1, x.ndim))
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    def run(inputs, tokens):
        results, pull = jax.vjp(lambda *a: sharded(*a, **tokens), *inputs)
        return results, pull(results)

    heads = (2, 2, 2, 2, 2, 1)  # the axis of heads in q, k, v, g, beta, initial_state
    placed = (
        [place(x, axis) for x, axis in zip(inputs, heads, strict=False)],
        {name: place(x) for name, x in tokens.items()},
    )
    calls = kernel_calls(run, *placed)
    assert len(calls) == kernels
    q, k = (
        "x".join(map(str, (1, 128, x.shape[2] // 2, 128))) for x in inputs[:2]
    )  # 70 tokens are filled up to 128
    assert all(call.startswith(f"(tensor<{q}xbf16>, tensor<{k}xbf16>, ") for call in calls), calls


def kernel_calls(run, *shapes):
    """Argument and result types of each kernel, outside of collectives."""
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(MOVES, text)
    return [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "@mosaic_gpu_v2" in line]


@pytest.mark.parametrize(
    ("run", "heads"),
    zip(MESHES, [(16, 2), (64, 2)], strict=True),
    ids=["one key head each", "shared key heads"],
)
def test_attention_step_lowers_for_cuda(run, heads):
    """On one or two of four rows, and one key head."""
    mesh, batch = make_mesh(run), 4 // (run.data * run.fsdp)
    arrays, rule = token_steps.first_token(
        attention_step_case("", [[3, -1, 200, 128]], heads, capacity=128), jnp.bfloat16
    )
    step = partial(
        partition_attention_step(attention_step_hopper.step, operator_mesh(mesh)), **rule
    )
    attention, merge = kernel_calls(step, *token_steps.placed(arrays, token_steps.ATTENTION, mesh))
    own, kv_cache = (
        f"tensor<{batch}x{heads[0] // mesh.shape['tensor']}x128xbf16>",
        f"tensor<{batch}x128x1x128xbf16>",
    )
    assert (
        attention.startswith(f"({own}, tensor<{batch}x1x128xbf16>, ")
        and attention.count(kv_cache) >= 2
    )
    assert merge.endswith(f"-> {own}")


def test_gated_delta_step_lowers_for_cuda():
    """On one of four rows, and two of four heads."""
    mesh = make_mesh(MESHES[0])
    arrays, rule = token_steps.first_token(
        gated_delta_rule_step_case("", [[3, -1, 0, 5]], heads=4), jnp.bfloat16
    )
    step = partial(
        partition_gated_delta_rule_step(delta_step_hopper.step, operator_mesh(mesh)), **rule
    )
    (call,) = kernel_calls(step, *token_steps.placed(arrays, token_steps.DELTA, mesh))
    assert call.startswith("(tensor<1x256xbf16>, ") and "tensor<1x2x128x256xf32>" in call


@pytest.mark.parametrize("run", MESHES, ids=str)
def test_the_short_convolution_trains_on_a_mesh(run):
    """The kernel runs on each device's channels, and only the gradient of the weight moves."""
    mesh = make_mesh(run)
    conv = partition_short_conv(conv_hopper.short_conv, operator_mesh(mesh))

    def loss(x, weight, token_index, segment_ids):
        return conv(x, weight, None, token_index, segment_ids)[0].astype(jnp.float32).sum()

    def placed(shape, dtype, *spec):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = placed((4, 256), jnp.int32, ("data", "fsdp"), None)
    x = placed((4, 256, 1024), jnp.bfloat16, ("data", "fsdp"), None, "tensor")
    weight = placed((4, 1024), jnp.float32, None, "tensor")
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, weight, rows, rows)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 1
    assert set(re.findall(MOVES, lowered)) <= {"all_reduce"}
