"""One token at a time by `Mixer.step` equals the general path with the norm before it and the
residual after it, with every option of the layers; sequences that stand still keep their state bit
for bit."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixer_options import WIDTH, config
from tiny import hybrid_config, initialised, shapes

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING
from infinitevl_jax.inputs.model_inputs import text_inputs
from infinitevl_jax.nn.layers import RMSNorm
from infinitevl_jax.nn.mixers import Mixer, layer_type
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import cache_spec, functional
from infinitevl_jax.nn.rope import decoder_angles
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.nn.vlm import VLM
from pallas_kernels.testing.parity import rel_rms

COUNTS, COLUMNS = np.array([30, 0, 17]), 34  # tokens of each sequence


def lay_out(rng):
    """[3, COLUMNS] token index, pads anywhere."""
    index = np.full((3, COLUMNS), -1, np.int32)
    for row, count in zip(index, COUNTS, strict=True):
        row[np.sort(rng.choice(COLUMNS, count, replace=False))] = np.arange(count)
    return index


def info_of(text, index, length):
    positions = jnp.broadcast_to(jnp.maximum(index, 0), (3, *index.shape))
    angles = decoder_angles(positions, text.rotary_dim, text.rope_theta, None)
    return TokenInfo(index, jnp.zeros_like(index), length, jnp.cos(angles), jnp.sin(angles))


OPTIONS = {"partial_rotary_factor": 0.25, "query_key_norm": True, "attention_output_gate": True}


@pytest.mark.parametrize(
    "kind, options, max_length",
    [
        (SLIDING, {}, None),
        (SLIDING, OPTIONS, None),
        (SLIDING, {"num_attention_sinks": 3}, None),
        (SLIDING, {"num_attention_sinks": 28}, 30),
        (SLIDING, {"num_attention_sinks": 50}, COLUMNS),
        (FULL, OPTIONS, COLUMNS),
        (LINEAR, {}, None),
        (LINEAR, {"num_linear_key_heads": 2}, None),
    ],
    ids=[
        "window",
        "window-options",
        "sinks",
        "sinks-short",
        "sinks-only",
        "full-options",
        "delta",
        "delta-grouped",
    ],
)
def test_steps_equal_the_general_path(kind, options, max_length):
    rng, text = np.random.default_rng(0), config(**options)
    mixer = initialised(layer_type(kind).make(text, Ops()))
    index = jnp.asarray(lay_out(rng))
    x = jnp.asarray(rng.normal(size=(3, COLUMNS, WIDTH)), jnp.float32)
    norm = initialised(RMSNorm(WIDTH, 1e-3))
    norm.weight[...] = jnp.asarray(1 + 0.4 * rng.normal(size=WIDTH), jnp.float32)
    empty = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), mixer.state_spec(3, max_length, jnp.float32)
    )

    @jax.jit
    def both(x, state):
        def token(carry, now):
            state, length = carry
            x, index = now
            info = info_of(text, index[:, None], length)
            out, state = mixer.step(x[:, None], norm, state, info)
            return (state, length + (index >= 0)), out[:, 0]

        start = state, jnp.zeros(3, jnp.int32)
        (last, _), out = jax.lax.scan(token, start, (x.swapaxes(0, 1), index.T))
        mixed, state = mixer(norm(x), state, info_of(text, index, jnp.zeros(3, jnp.int32)))
        return (out.swapaxes(0, 1), last), (x + mixed, state)

    (out, last), (wanted, state) = both(x, empty)
    valid = np.asarray(index >= 0)
    assert rel_rms(out[valid], wanted[valid]) <= 1e-6
    for found, other, before in zip(last, state, empty, strict=True):
        assert rel_rms(found, other) <= 1e-6
        np.testing.assert_array_equal(found[1], before[1])  # a sequence without tokens


def test_a_model_decodes_by_the_step_operators():
    """One token with a cache reaches no other operator than the norms' and the steps'."""

    def refuse(*args, **kwargs):
        raise AssertionError("the general path")

    general = ("attention", "gated_delta_rule", "short_conv")
    ops = dataclasses.replace(Ops(), **dict.fromkeys(general, refuse))
    model = hybrid_config()
    bind = functional(model, scanned=False, ops=ops)

    def decode(params, cache, tokens, method=VLM.step):
        vlm, inputs = bind(params), text_inputs(tokens)
        return method(vlm, vlm.embed(inputs, None), inputs, cache)[1]

    cache = cache_spec(model, 2, None, jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    assert jax.eval_shape(decode, shapes(model), cache, tokens) == cache
    with pytest.raises(AssertionError, match="the general path"):
        jax.eval_shape(partial(decode, method=VLM.decode), shapes(model), cache, tokens)


def test_a_mixer_without_a_step_takes_its_general_path():
    class Sum(Mixer):
        def __call__(self, x, state, info):
            return x + state, state + 1

    out, state = Sum().step(jnp.ones((2, 1, 3)), lambda x: 5 * x, jnp.full((), 2.0), None)
    assert out.tolist() == np.full((2, 1, 3), 1 + 5 + 2).tolist() and state == 3
