"""The kernels for TPUs, interpreted on meshes of 8 devices, against the same kernels interpreted on one: values and gradients."""

from functools import partial

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.sharding.kernels import shard_attend, shard_causal_conv, shard_gated_delta_rule
from pallas_kernels.attend import Mask
from pallas_kernels.attend import mosaic_tpu as attend_tpu
from pallas_kernels.causal_conv import mosaic_tpu as conv_tpu
from pallas_kernels.gated_delta_rule import mosaic_tpu as delta_tpu
from pallas_kernels.testing.parity import GATES, packing, padding, poison, rel_rms, unit, with_gradients

MESHES = RunConfig(data=2, fsdp=2, tensor=2), RunConfig(fsdp=2, tensor=4)  # the second with more shards than key heads
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


def tokens(length):
    """Index and segment of packed rows, a full one and an empty one."""
    packed = packing([17, 3, length - 25], length), packing([length - 2, 2], length)
    index, segment = (np.concatenate(x) for x in zip(*packed, strict=True))
    alone = padding([length, 0], length)
    return np.concatenate([index, alone]), np.concatenate([segment, np.zeros_like(alone)])


def compare(function, spread, inputs, cotangents, tokens, **rule):
    whole = with_gradients(partial(function, **rule))(inputs, cotangents, tokens)
    for run in MESHES:
        parts = with_gradients(partial(spread(function, make_mesh(run)), **rule))(inputs, cotangents, tokens)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])  # lse of queries that see nothing; no NaN
            assert rel_rms(a[finite], b[finite]) <= 1e-6


def test_attend():
    rng = np.random.default_rng(0)
    index, segment = tokens(130)
    lead = index.shape
    q, d_out = (np.float32(rng.normal(size=(*lead, 8, 16))) for _ in range(2))
    k, v = (np.float32(rng.normal(size=(*lead, 2, 16))) for _ in range(2))
    everyone = {"q_index": index, "k_index": index, "q_segment": segment, "k_segment": segment}
    step = attend_tpu.Block(128, 128, 2)  # two blocks of tokens
    attend = partial(attend_tpu.attend, interpret=INTERPRET, tuning=attend_tpu.Tuning(step, step, step))
    inputs = [poison(x, index) for x in (q, k, v)]
    cotangents = d_out, np.float32(rng.normal(size=(*lead, 8)))
    compare(attend, shard_attend, inputs, cotangents, everyone, mask=Mask(window=70, aligned=True), scale=0.25)


def test_gated_delta_rule():
    rng = np.random.default_rng(0)
    index, segment = tokens(60)
    lead = (*index.shape, 4)
    inputs = unit(rng, (*lead, 128)), unit(rng, (*lead, 128)), rng.normal(size=(*lead, 128)), GATES["mild"](rng, lead), rng.random(lead)
    inputs = [*(poison(x, index) for x in inputs), rng.normal(size=(4, 4, 128, 128))]
    cotangents = rng.normal(size=(*lead, 128)), rng.normal(size=(4, 4, 128, 128))
    inputs, cotangents = (tuple(map(np.float32, x)) for x in (inputs, cotangents))
    delta_rule = partial(delta_tpu.gated_delta_rule, interpret=INTERPRET)
    compare(delta_rule, shard_gated_delta_rule, inputs, cotangents, {"index": index, "segment": segment})


def test_causal_conv():
    rng = np.random.default_rng(0)
    index, segment = tokens(60)
    x, d_out = rng.normal(size=(2, *index.shape, 512))
    inputs = tuple(map(np.float32, (poison(x, index), rng.normal(size=(4, 512)), rng.normal(size=(4, 3, 512)))))
    cotangents = np.float32(d_out), np.float32(rng.normal(size=(4, 3, 512)))
    convolve = partial(conv_tpu.causal_conv, interpret=INTERPRET)
    compare(convolve, shard_causal_conv, inputs, cotangents, {"index": index, "segment": segment})
