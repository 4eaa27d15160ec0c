"""The kernels for Hopper on meshes of 8 devices: lowered for CUDA, and dense products in their place on a CPU against one device.

The products themselves are interpreted on one device (tests/pallas_kernels/test_mosaic_gpu_interpreted.py).
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
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.sharding.kernels import shard_attend, shard_attend_step, shard_gated_delta_rule, shard_gated_delta_step
from pallas_kernels.attend import Mask
from pallas_kernels.attend import decode_mosaic_gpu as attend_step_gpu
from pallas_kernels.attend import mosaic_gpu as attend_gpu
from pallas_kernels.gated_delta_rule import decode_mosaic_gpu as delta_step_gpu
from pallas_kernels.gated_delta_rule import mosaic_gpu as delta_gpu
from pallas_kernels.testing.cases import attend_step_case, gated_delta_step_case
from pallas_kernels.testing.parity import GATES, packing, padding, poison, rel_rms, unit, with_gradients

MESHES = RunConfig(data=2, fsdp=2, tensor=2), RunConfig(fsdp=2, tensor=4)  # the second with more shards than key heads
LENGTH = 70
MOVES = r"stablehlo\.(all_gather|all_reduce|all_to_all|reduce_scatter|collective_\w+)"


def tokens():
    """Index and segment of packed rows, a full one and an empty one."""
    packed = packing([17, 3, 40], LENGTH), packing([66, 2], LENGTH)
    index, segment = (np.concatenate(x) for x in zip(*packed, strict=True))
    alone = padding([LENGTH, 0], LENGTH)
    return np.concatenate([index, alone]), np.concatenate([segment, np.zeros_like(alone)])


def attend_case():
    rng = np.random.default_rng(0)
    index, segment = tokens()
    q, d_out = (rng.normal(size=(*index.shape, 8, 128)) for _ in range(2))
    k, v = (rng.normal(size=(*index.shape, 2, 128)) for _ in range(2))
    inputs = [jnp.asarray(poison(x, index), jnp.bfloat16) for x in (q, k, v)]
    cotangents = jnp.asarray(d_out, jnp.bfloat16), np.float32(rng.normal(size=(*index.shape, 8)))
    everyone = {"q_index": index, "k_index": index, "q_segment": segment, "k_segment": segment}
    return attend_gpu.attend, shard_attend, inputs, cotangents, everyone, {"mask": Mask(window=9, aligned=True), "scale": 0.1}


def delta_case():
    rng = np.random.default_rng(0)
    index, segment = tokens()
    lead = (*index.shape, 4)
    wide = [poison(x, index) for x in (unit(rng, (*lead, 128)), unit(rng, (*lead, 128)), rng.normal(size=(*lead, 64)))]
    rest = poison(GATES["mild"](rng, lead), index), poison(rng.random(lead), index), rng.normal(size=(4, 4, 128, 64))
    inputs = [*(jnp.asarray(x, jnp.bfloat16) for x in wide), *map(np.float32, rest)]
    cotangents = jnp.asarray(rng.normal(size=(*lead, 64)), jnp.bfloat16), np.float32(rng.normal(size=(4, 4, 128, 64)))
    return delta_gpu.gated_delta_rule, shard_gated_delta_rule, inputs, cotangents, {"index": index, "segment": segment}, {}


OPERATORS = "attend", "gated_delta_rule"


@pytest.mark.parametrize(("case", "meshes"), [(attend_case, MESHES), (delta_case, MESHES[:1])], ids=OPERATORS)
def test_frame(case, meshes, monkeypatch):
    dense_kernels.replace(monkeypatch)
    function, spread, inputs, cotangents, tokens, rule = case()
    whole = with_gradients(partial(function, **rule))(inputs, cotangents, tokens)
    for run in meshes:
        parts = with_gradients(partial(spread(function, make_mesh(run)), **rule))(inputs, cotangents, tokens)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            allowed = 1e-6 if a.dtype == np.float32 else 1e-4  # in bfloat16 a few numbers are rounded the other way
            if a.ndim == 4 and a.shape[2] < run.tensor:
                allowed = 4e-3  # gradients of keys that shards share: a sum of parts that are rounded to bfloat16
            assert rel_rms(a[finite], b[finite]) <= allowed


@pytest.mark.parametrize(("case", "kernels"), [(attend_case, 2), (delta_case, 4)], ids=OPERATORS)
def test_lowers_for_cuda(case, kernels):
    """Each kernel once, on a device's own rows and heads, and nothing moves between devices."""
    function, spread, inputs, _, tokens, rule = case()
    mesh = make_mesh(MESHES[0])
    sharded = partial(spread(function, mesh), **rule)

    def place(x, heads=None):
        split = PartitionSpec(("data", "fsdp"), *("tensor" if axis == heads else None for axis in range(1, x.ndim)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    def run(inputs, tokens):
        results, pull = jax.vjp(lambda *a: sharded(*a, **tokens), *inputs)
        return results, pull(results)

    heads = (2, 2, 2, 2, 2, 1)  # the axis of heads in q, k, v, g, beta, initial_state
    placed = [place(x, axis) for x, axis in zip(inputs, heads, strict=False)], {name: place(x) for name, x in tokens.items()}
    calls = kernel_calls(run, *placed)
    assert len(calls) == kernels
    q, k = ("x".join(map(str, (1, 128, x.shape[2] // 2, 128))) for x in inputs[:2])  # 70 tokens are filled up to 128
    assert all(call.startswith(f"(tensor<{q}xbf16>, tensor<{k}xbf16>, ") for call in calls), calls


def kernel_calls(run, *shapes):
    """Types of each kernel's arguments and results, where nothing moves between devices."""
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(MOVES, text)
    return [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "@mosaic_gpu_v2" in line]


@pytest.mark.parametrize(("run", "heads"), zip(MESHES, [(16, 2), (64, 2)], strict=True), ids=["one key head each", "shared key heads"])
def test_attend_step_lowers_for_cuda(run, heads):
    """On one or two of four rows, and a key head."""
    mesh, batch = make_mesh(run), 4 // (run.data * run.fsdp)
    arrays, rule = token_steps.first_token(attend_step_case("", [[3, -1, 200, 128]], heads, capacity=128), jnp.bfloat16)
    step = partial(shard_attend_step(attend_step_gpu.step, mesh), **rule)
    attend, merge = kernel_calls(step, *token_steps.placed(arrays, token_steps.ATTEND, mesh))
    own, ring = f"tensor<{batch}x{heads[0] // mesh.shape['tensor']}x128xbf16>", f"tensor<{batch}x128x1x128xbf16>"
    assert attend.startswith(f"({own}, tensor<{batch}x1x128xbf16>, ") and attend.count(ring) >= 2
    assert merge.endswith(f"-> {own}")


def test_gated_delta_step_lowers_for_cuda():
    """On one of four rows, and two of four heads."""
    mesh = make_mesh(MESHES[0])
    arrays, rule = token_steps.first_token(gated_delta_step_case("", [[3, -1, 0, 5]], heads=4), jnp.bfloat16)
    step = partial(shard_gated_delta_step(delta_step_gpu.step, mesh), **rule)
    (call,) = kernel_calls(step, *token_steps.placed(arrays, token_steps.DELTA, mesh))
    assert call.startswith("(tensor<1x256xbf16>, ") and "tensor<1x2x128x256xf32>" in call
