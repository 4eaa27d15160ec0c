"""Sinks: the first tokens of a sequence that sliding-window layers always see."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixer_options import WIDTH, config
from test_token_step import info_of
from tiny import hybrid, hybrid_config, initialised, shapes

from infinitevl_jax.config.model import FULL, SLIDING
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import read_config, to_huggingface
from infinitevl_jax.nn.mixers import layer_type
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import cache_spec, functional
from pallas_kernels.attention import KVCache, held_tokens, write
from pallas_kernels.attention.hopper import step as hopper_step
from pallas_kernels.attention.state import slot_of
from pallas_kernels.testing.parity import rel_rms

WINDOW, SINKS, LENGTH = 7, 5, 40
TEXT = dataclasses.replace(config(num_attention_sinks=SINKS), sliding_window=WINDOW)


@pytest.mark.parametrize("capacity, sinks", [(8, 3), (8, 0), (4, 3), (4, 9)])
def test_slots(capacity, sinks):
    """By hand, token after token; a cache with fewer slots than sinks holds whole sequences."""
    kept = min(sinks, capacity - 1)
    held = np.full(capacity, -1)
    for length in range(30 if sinks < capacity else capacity + 1):
        found = held_tokens(jnp.array([length]), capacity, sinks)
        np.testing.assert_array_equal(found[0], held)
        slot = length if length < kept else kept + (length - kept) % (capacity - kept)
        assert int(slot_of(jnp.array(length), capacity, sinks)) == slot
        held[slot] = length


def test_write_keeps_sinks_and_the_newest():
    index = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 8, -1], [6, 7, 8, 9, 10, 11, -1, -1, -1, -1]])
    k = index[..., None, None].astype(jnp.float32)
    before = KVCache(*[jnp.full((2, 6, 1, 1), 100.0)] * 2)
    after = write(before, k, k, index, sinks=2)
    np.testing.assert_array_equal(after.k[0, :, 0, 0], [0, 1, 6, 7, 8, 5])
    np.testing.assert_array_equal(after.k[1, :, 0, 0], [100, 100, 10, 11, 8, 9])


def dense(mixer, x, info, starts):
    """The mixer in float64, a token at a time: every key is kept and the mask is written out."""
    x = np.float64(x)

    def project(layer):
        y = x @ np.float64(layer.kernel[...])
        return y if layer.bias is None else y + np.float64(layer.bias[...])

    def rotated(y):
        first, second = np.split(y, 2, -1)
        cos, sin = (np.float64(z)[0, :, None] for z in (info.cos, info.sin))
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    q, k, v = (
        project(layer).reshape(len(x), -1, TEXT.head_dim)
        for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k = rotated(q), rotated(k)
    out = np.zeros((len(x), TEXT.num_attention_heads, TEXT.head_dim))
    for i in range(len(x)):
        start = max(s for s in starts if s <= i)
        seen = [j for j in range(start, i + 1) if i - j < WINDOW or j - start < SINKS]
        for head in range(TEXT.num_attention_heads):
            group = head * TEXT.num_key_value_heads // TEXT.num_attention_heads
            scores = k[seen, group] @ q[i, head] * TEXT.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[seen, group]
    return out.reshape(len(x), -1) @ np.float64(mixer.o_proj.kernel[...])


@pytest.mark.parametrize("starts", [(0,), (0, 3, 25)], ids=["one", "packed"])
def test_equals_float64(starts):
    mixer = initialised(layer_type(SLIDING).make(TEXT, Ops()))
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    segments = (np.arange(LENGTH)[:, None] >= np.array(starts)).sum(1) - 1
    index = np.arange(LENGTH) - np.array(starts)[segments]
    info = info_of(TEXT, jnp.asarray(index, jnp.int32)[None], jnp.zeros(1, jnp.int32))
    info = info._replace(segment_ids=jnp.asarray(segments, jnp.int32)[None])
    out, _ = jax.jit(lambda x, info: mixer(x, None, info))(x, info)
    assert rel_rms(out[0], dense(mixer, x[0], info, starts)) <= 1e-6


@pytest.fixture(scope="module")
def model():
    return hybrid(layers=2, window=WINDOW, num_attention_sinks=SINKS)


def test_chunks_equal_one_shot(model):
    """Pieces that end among the sinks, in the first window and far behind it."""
    tokens = np.random.default_rng(1).integers(1, 90, (1, LENGTH))
    whole = model(tokens).logits
    cache, out = model.init_cache(1), []
    for a, b in ((0, 3), (3, 4), (4, 11), (11, 12), (12, 39), (39, 40)):
        result = model(tokens[:, a:b], cache=cache)
        cache, out = result.cache, [*out, result.logits]
    assert rel_rms(np.concatenate(out, 1), whole) <= 1e-5
    text = dataclasses.replace(model.config.text, num_attention_sinks=0)
    plain = type(model)(dataclasses.replace(model.config, text=text), model.params)(tokens).logits
    np.testing.assert_array_equal(plain[:, :WINDOW], whole[:, :WINDOW])
    assert rel_rms(plain[:, WINDOW + 1 :], whole[:, WINDOW + 1 :]) > 1e-2


def test_cache_holds_sinks_and_window(model):
    state = cache_spec(model.config, 1, None, jnp.float32).layers[0]
    assert state.k.shape[1] == SINKS + WINDOW


def test_a_bounded_cache_is_no_larger_than_its_sequences():
    """Branches of training: a window of slots for each would not fit."""
    config = hybrid_config(window=24, num_attention_sinks=SINKS)
    vlm = functional(config, scanned=False)(shapes(config))
    for length, slots in ((10, 10), (100, 24 + SINKS), (None, 24 + SINKS)):
        assert vlm.cache_spec(3, length).layers[0].k.shape[:2] == (3, slots)


def test_config(tmp_path):
    """Only this project's InfiniteVL has the key; without sinks the file stays as published."""
    with_sinks = hybrid_config(num_attention_sinks=SINKS)
    content = to_huggingface(with_sinks)
    assert content["num_attention_sinks"] == SINKS
    assert "num_attention_sinks" not in to_huggingface(hybrid_config())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).text == with_sinks.text
    text = dataclasses.replace(
        with_sinks.text, layer_types=(FULL, SLIDING), mrope_section=None, tie_word_embeddings=False
    )
    qwen = dataclasses.replace(with_sinks, text=text, vision=None, family="qwen2")
    with pytest.raises(InfiniteVLError, match="num_attention_sinks is 5, which qwen2 cannot say"):
        to_huggingface(qwen)
    plain = dataclasses.replace(text, num_attention_sinks=0)
    content = to_huggingface(dataclasses.replace(qwen, text=plain)) | {"num_attention_sinks": 5}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InfiniteVLError, match="num_attention_sinks"):
        read_config(tmp_path)


def test_the_step_for_hopper_refuses_by_name():
    q, k = (jax.ShapeDtypeStruct((1, n, 128), jnp.bfloat16) for n in (16, 2))
    kv_cache = KVCache(*[jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)] * 2)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert hopper_step.supports(q, k, k, kv_cache, index) is None
    assert hopper_step.supports(q, k, k, kv_cache, index, sinks=1) == "sinks outside the window"
