"""Prefill, chunked prefill and single steps agree beyond the window, padded and interleaved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import conversation, hybrid

from infinitevl_jax.config.model import LINEAR, SLIDING, infinitevl_4b
from infinitevl_jax.inputs.batch import TokenSequence, join_sequences
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.params import cache_spec, functional, initialize, unstack
from infinitevl_jax.serve.infinitevl import InfiniteVL
from pallas_kernels.testing.parity import rel_rms

TOLERANCE = 1e-5
KINDS = (SLIDING, LINEAR) * 2 + (SLIDING,)  # two periods and a remainder


@pytest.fixture(scope="module")
def model():
    return hybrid(layers=2, window=24)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(1, 90, (1, 130))


@pytest.fixture(scope="module")
def whole(model, tokens):
    return np.asarray(model(tokens).logits)


def in_pieces(model, tokens, cuts):
    """Logits of a text processed in pieces, and the final cache."""
    cache, out = model.init_cache(1), []
    for a, b in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        result = model(tokens[:, a:b], cache=cache)
        cache = result.cache
        out.append(np.asarray(result.logits))
    return np.concatenate(out, 1), cache


@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_equal_one_shot(model, tokens, whole, seed):
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, 130), 4, replace=False)).tolist()
    assert rel_rms(in_pieces(model, tokens, cuts)[0], whole) <= TOLERANCE


def test_token_by_token_equals_one_shot(model, tokens, whole):
    logits, cache = in_pieces(model, tokens, range(1, 130))
    assert rel_rms(logits, whole) <= TOLERANCE
    assert cache.length.tolist() == [130] and cache.next_position.tolist() == [130]


def test_images_and_video_in_chunks(model):
    batch = conversation(model.config, text=60)
    expected = model(**batch, use_cache=True)
    inputs = build_inputs(model.config, **batch)
    ids = batch["input_ids"]
    # text, image and text, video and text: each part continues the cache
    image = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")}
    video = {
        k: v
        for k, v in batch.items()
        if k in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    }
    cache, logits = model.init_cache(1), []
    for part, extra in (
        (slice(0, 4), {}),
        (slice(4, 24), image),
        (slice(24, 100), video),
        (slice(100, None), {}),
    ):
        out = model(ids[:, part], cache=cache, **extra)
        cache = out.cache
        logits.append(np.asarray(out.logits))
    assert rel_rms(np.concatenate(logits, 1), expected.logits) <= TOLERANCE
    assert (
        cache.next_position.tolist()
        == expected.cache.next_position.tolist()
        == [int(inputs.decoder.positions.max()) + 1]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single(model, tokens, side):
    lengths = [130, 3, 61]
    ids, mask = np.zeros((3, 130), int), np.zeros((3, 130), int)
    place = [slice(130 - n, 130) if side == "left" else slice(0, n) for n in lengths]
    for row, (where, n) in enumerate(zip(place, lengths, strict=True)):
        ids[row, where], mask[row, where] = tokens[0, :n], 1
    out = model(ids, mask, use_cache=True)
    for row, (where, n) in enumerate(zip(place, lengths, strict=True)):
        alone = model(tokens[:, :n], use_cache=True)
        assert rel_rms(out.logits[row, where], alone.logits[0]) <= TOLERANCE
        following = np.full((3, 1), 7)
        assert (
            rel_rms(
                model(following, cache=out.cache).logits[row],
                model(following[:1], cache=alone.cache).logits[0],
            )
            <= TOLERANCE
        )


def test_interleaved_conversations_are_bit_equal_to_separate_ones(model, tokens):
    texts = [tokens[:, :40], tokens[:, 40:90]]
    separate = []
    for text in texts:
        cache = model.init_cache(1)
        for at in range(0, 40, 10):
            cache = model(text[:, at : at + 10], cache=cache).cache
        separate.append(cache)
    caches = [model.init_cache(1), model.init_cache(1)]
    for at in range(0, 40, 10):
        for i, text in enumerate(texts):
            caches[i] = model(text[:, at : at + 10], cache=caches[i]).cache
    for a, b in zip(jax.tree.leaves(separate), jax.tree.leaves(caches), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("count", [10, 1])
def test_idle_rows_keep_their_state_bit_for_bit(model, tokens, count):
    cache = model(np.repeat(tokens[:, :30], 2, 0), use_cache=True).cache
    after = model(
        np.repeat(tokens[:, 30 : 30 + count], 2, 0),
        np.array([[1] * count, [0] * count]),
        cache=cache,
    ).cache
    assert after.length.tolist() == [30 + count, 30]
    for before, now in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[1], np.asarray(now)[1])


def test_branches_do_not_touch_their_parent(model, tokens):
    cache = model(tokens[:, :50], use_cache=True).cache
    kept = jax.tree.map(np.asarray, cache)
    branches = cache.select(jnp.array([0, 0]))
    out = model(np.array([[3, 4], [5, 6]]), cache=branches)
    assert rel_rms(out.logits[1], model(np.array([[5, 6]]), cache=cache).logits[0]) <= TOLERANCE
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, cache))


def test_cache_bytes_do_not_grow(model):
    """By hand, and whatever is read: the cache after a chunk is of the kind of the one before. The
    4B model has 127.3 MiB + one slot a window."""
    short = model(np.ones((1, 100), int), use_cache=True).cache
    assert short.nbytes == cache_spec(model.config, 1, None, jnp.float32).nbytes
    text = model.config.text
    slot = 2 * text.num_key_value_heads * text.head_dim
    keys = text.num_linear_heads * text.linear_head_dim
    values = text.num_linear_heads * text.linear_value_dim
    state = keys * text.linear_value_dim + (text.conv_size - 1) * (2 * keys + values)
    sizes = {SLIDING: slot * text.sliding_window, LINEAR: state}
    assert short.nbytes == 4 * sum(sizes[kind] for kind in text.layer_types)
    step = jax.jit(
        lambda cache: model.programs.forward(
            model.params, chunk, None, cache, np.zeros((1, 1), np.int32)
        )[1]
    )
    chunk = build_inputs(model.config, np.ones((1, 500), int)).decoder
    kind = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.init_cache(1))
    assert jax.eval_shape(step, kind) == kind
    long = step(step(short))
    assert long.length.tolist() == [1100]
    assert long.nbytes == short.nbytes
    assert (
        cache_spec(infinitevl_4b(), 1, None, jnp.bfloat16).nbytes
        == 133_438_464 + 9 * 2 * 2 * 128 * 2
    )


def test_packed_equals_unpacked_with_gradients():
    """Three texts in one row equal one per row: loss and gradients of the scanned layout."""
    from tiny import hybrid_config, loud

    config = hybrid_config(layer_types=KINDS)
    params = loud(initialize(config, jax.random.key(0), scanned=True))
    bind = functional(config, scanned=True)
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 90, n) for n in (17, 40, 5)]
    weight = [rng.normal(size=(n, config.text.hidden_size)) for n in (17, 40, 5)]

    def loss(params, inputs, weight):
        vlm = bind(params)
        return jnp.sum(vlm.decode(vlm.embed(inputs, None), inputs)[0] * weight)

    def lay_out(packing):
        batch = join_sequences([TokenSequence(text) for text in texts])
        return (
            build_inputs(config, **batch, packing=packing).decoder,
            np.moveaxis(packing.lay_out([w.T for w in weight], dtype=np.float64), 0, -1),
        )

    step = jax.jit(jax.value_and_grad(loss))
    packing = Packing(1, 64)
    assert all(packing.add(len(text)) for text in texts)
    value, grads = step(params, *lay_out(packing))
    inputs, weights = lay_out(Packing.one_per_row([len(text) for text in texts], 64))
    parts = [
        step(params, jax.tree.map(lambda x, i=i: x[..., i : i + 1, :], inputs), weights[i : i + 1])
        for i in range(3)
    ]
    assert rel_rms(value, sum(p[0] for p in parts)) <= TOLERANCE
    for name in grads:
        if not name.startswith("visual."):
            assert rel_rms(grads[name], sum(p[1][name] for p in parts)) <= TOLERANCE, name


def test_layouts_agree():
    """Scanned and unrolled layouts hold the same model."""
    from tiny import hybrid_config

    config = hybrid_config(layer_types=KINDS)
    tokens = np.random.default_rng(0).integers(1, 90, (2, 33))
    scanned = initialize(config, jax.random.key(3), scanned=True)
    model = InfiniteVL(config, unstack(config, dict(scanned)))
    inputs = build_inputs(config, tokens).decoder

    @jax.jit
    def run(params):
        vlm = functional(config, scanned=True)(params)
        hidden, _, states = vlm.decode(vlm.embed(inputs, None), inputs, collect=True)
        return vlm.logits(hidden), states

    logits, states = run(scanned)
    out = model(tokens, output_hidden_states=True)
    assert rel_rms(logits, out.logits) <= TOLERANCE
    assert len(states) == len(out.hidden_states) == len(KINDS) + 1
    for a, b in zip(states, out.hidden_states, strict=True):
        assert rel_rms(a, b) <= TOLERANCE
