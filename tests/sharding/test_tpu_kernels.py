"""TPU kernels interpreted on meshes of 8 devices equal those on one: values and gradients."""

from functools import partial

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh, operator_mesh
from pallas_kernels.attention import Mask
from pallas_kernels.attention.partition import partition_attention
from pallas_kernels.attention.tpu import attention as attention_tpu
from pallas_kernels.gated_delta_rule.partition import partition_gated_delta_rule
from pallas_kernels.gated_delta_rule.tpu import gated_delta_rule as delta_tpu
from pallas_kernels.short_conv.partition import partition_short_conv
from pallas_kernels.short_conv.tpu import short_conv as short_conv_tpu
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
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


def tokens(length):
    """Token indices and segment ids of packed rows, a full row and an empty row."""
    packed = packing([17, 3, length - 25], length), packing([length - 2, 2], length)
    token_index, segment_ids = (np.concatenate(x) for x in zip(*packed, strict=True))
    alone = padding([length, 0], length)
    return np.concatenate([token_index, alone]), np.concatenate([segment_ids, np.zeros_like(alone)])


def compare(function, spread, inputs, cotangents, tokens, **rule):
    whole = with_gradients(partial(function, **rule))(inputs, cotangents, tokens)
    for run in MESHES:
        parts = with_gradients(partial(spread(function, operator_mesh(make_mesh(run))), **rule))(
            inputs, cotangents, tokens
        )
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            finite = np.isfinite(b)
            np.testing.assert_array_equal(
                a[~finite], b[~finite]
            )  # lse of queries that see nothing; no NaN
            assert rel_rms(a[finite], b[finite]) <= 1e-6


def test_attention():
    rng = np.random.default_rng(0)
    token_index, segment_ids = tokens(130)
    lead = token_index.shape
    q, d_out = (np.float32(rng.normal(size=(*lead, 8, 16))) for _ in range(2))
    k, v = (np.float32(rng.normal(size=(*lead, 2, 16))) for _ in range(2))
    everyone = {
        "q_token_index": token_index,
        "k_token_index": token_index,
        "q_segment_ids": segment_ids,
        "k_segment_ids": segment_ids,
    }
    step = attention_tpu.Block(128, 128, 2)  # two blocks of tokens
    attention = partial(
        attention_tpu.attention, interpret=INTERPRET, tuning=attention_tpu.Tuning(step, step, step)
    )
    inputs = [poison(x, token_index) for x in (q, k, v)]
    cotangents = d_out, np.float32(rng.normal(size=(*lead, 8)))
    compare(
        attention,
        partition_attention,
        inputs,
        cotangents,
        everyone,
        mask=Mask(window=70, aligned=True),
        scale=0.25,
    )


def test_gated_delta_rule():
    rng = np.random.default_rng(0)
    token_index, segment_ids = tokens(60)
    lead = (*token_index.shape, 4)
    inputs = (
        unit(rng, (*lead, 128)),
        unit(rng, (*lead, 128)),
        rng.normal(size=(*lead, 128)),
        GATES["mild"](rng, lead),
        rng.random(lead),
    )
    inputs = [*(poison(x, token_index) for x in inputs), rng.normal(size=(4, 4, 128, 128))]
    cotangents = rng.normal(size=(*lead, 128)), rng.normal(size=(4, 4, 128, 128))
    inputs, cotangents = (tuple(map(np.float32, x)) for x in (inputs, cotangents))
    delta_rule = partial(delta_tpu.gated_delta_rule, interpret=INTERPRET)
    compare(
        delta_rule,
        partition_gated_delta_rule,
        inputs,
        cotangents,
        {"token_index": token_index, "segment_ids": segment_ids},
    )


def test_short_conv():
    rng = np.random.default_rng(0)
    token_index, segment_ids = tokens(60)
    x, d_out = rng.normal(size=(2, *token_index.shape, 512))
    inputs = tuple(
        map(
            np.float32,
            (poison(x, token_index), rng.normal(size=(4, 512)), rng.normal(size=(4, 3, 512))),
        )
    )
    cotangents = np.float32(d_out), np.float32(rng.normal(size=(4, 3, 512)))
    convolve = partial(short_conv_tpu.short_conv, interpret=INTERPRET)
    compare(
        convolve,
        partition_short_conv,
        inputs,
        cotangents,
        {"token_index": token_index, "segment_ids": segment_ids},
    )
