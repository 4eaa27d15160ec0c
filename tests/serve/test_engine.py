"""The engine: every request gets what it would get alone, whoever shares the device."""

import jax
import numpy as np
import pytest
from tiny_folder import IDS, full_attention_config, tiny_config, tiny_model

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.serve.engine import Engine
from pallas_kernels.testing.parity import rel_rms

END = IDS["<|im_end|>"]
SHAPE = {"chunk": 16, "steps": 4, "patches": 24}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


def text(length, seed):
    return np.random.default_rng(seed).integers(97, 123, (1, length))


def picture(seed, grids=((1, 8, 8),), videos=()):
    """A prompt with pictures and videos of random patches, [frames, rows, columns] each."""
    rng, ids = np.random.default_rng(seed), [*range(97, 103)]
    batch = {}
    for kind, sizes in (("image", grids), ("video", videos)):
        for grid in sizes:
            tokens = int(np.prod(grid)) // 4
            ids += [IDS["<|vision_start|>"], *[IDS[f"<|{kind}_pad|>"]] * tokens]
            ids += [IDS["<|vision_end|>"], 104, 105]
        if sizes:
            pixels = rng.normal(size=(sum(int(np.prod(g)) for g in sizes), 24)).astype("float32")
            names = {
                "image": ("pixel_values", "image_grid_thw"),
                "video": ("pixel_values_videos", "video_grid_thw"),
            }[kind]
            batch |= {names[0]: pixels, names[1]: np.array(sizes)}
    return {"input_ids": np.array([ids]), **batch}


REQUESTS = [
    ({"input_ids": text(5, 0)}, {"max_new_tokens": 9}),
    ({"input_ids": text(50, 1)}, {"max_new_tokens": 23, "eos_token_ids": []}),
    (picture(2), {"max_new_tokens": 12}),
    ({"input_ids": text(16, 3)}, {"max_new_tokens": 20, "temperature": 1.3, "seed": 7}),
    (picture(4, ((1, 4, 4), (1, 12, 8)), ((3, 4, 8),)), {"max_new_tokens": 7}),
    (
        {"input_ids": text(33, 5)},
        {"max_new_tokens": 30, "temperature": 0.9, "top_k": 9, "top_p": 0.8, "seed": 1},
    ),
    ({"input_ids": text(1, 6)}, {"max_new_tokens": 1}),
    (
        {"input_ids": text(40, 7)},
        {"max_new_tokens": 25, "repetition_penalty": 1.4, "eos_token_ids": []},
    ),
]


@pytest.fixture(scope="module")
def alone(model):
    """The tokens of each request in an engine of its own, of two slots."""
    engine = Engine(model, slots=2, **SHAPE)
    return [engine.submit(**batch, **asked).result().tolist() for batch, asked in REQUESTS]


def test_requests_equal_generate(model, alone):
    """Drawn ones as well: a seed gives the same tokens."""
    for (batch, asked), tokens in zip(REQUESTS, alone, strict=True):
        assert tokens == model.generate(**batch, **asked)[0][: len(tokens)].tolist()
        assert len(tokens) == asked["max_new_tokens"] or tokens[-1] == END


def test_sharing_changes_nothing(model, alone):
    """All at once in two slots, joining late, and with others that leave in the middle."""
    engine = Engine(model, slots=2, **SHAPE)
    requests = [engine.submit(**batch, **asked) for batch, asked in REQUESTS]
    engine.run()
    assert [request.tokens for request in requests] == alone

    requests = []
    for number, (batch, asked) in enumerate(REQUESTS):
        requests.append(engine.submit(**batch, **asked))
        noise = engine.submit(text(20, 100 + number), max_new_tokens=50, temperature=2.0)
        for _ in range(number):
            engine.step()
        noise.cancel()
    assert [list(request) for request in requests] == alone


def test_a_request_leaves_the_same_cache_whoever_is_beside_it(model):
    """Bit for bit with the other slot idle, busy, or joining and leaving; that of a batch of one
    but for rounding."""
    asked = {"max_new_tokens": 22, "eos_token_ids": []}
    engine, caches = Engine(model, slots=2, **SHAPE), []
    for beside in ((), (60,), (5, 9)):
        request = engine.submit(text(37, 1), **asked, keep_cache=True)
        for number, count in enumerate(beside):
            engine.submit(text(20, number), max_new_tokens=count, eos_token_ids=[])
        request.result()
        engine.run()
        caches.append(jax.tree.map(np.asarray, request.cache))
    for cache in caches[1:]:
        jax.tree.map(np.testing.assert_array_equal, cache, caches[0])
    logits, cache = model.prefill(build_inputs(model.config, text(37, 1)), model.init_cache(1))
    *_, (_, alone) = model.decode(logits, cache, **asked)
    after = [model(text(3, 3), cache=c).logits for c in (caches[0], alone)]
    assert caches[0].length.tolist() == alone.length.tolist() == [58]
    assert rel_rms(*after) <= 1e-5


def test_nothing_is_compiled_after_the_first_requests():
    model = tiny_model(tiny_config())
    engine = Engine(model, slots=2, **SHAPE)
    for batch, asked in (REQUESTS[0], REQUESTS[4]):
        engine.submit(**batch, **asked, keep_cache=True).result()
    engine.submit(text(9, 0), temperature=1.0, max_new_tokens=5).result()

    def compiled():
        run = model.programs
        programs = run.prefill, run.decode, run.enter, engine._stage._copy, run.stop, run.take
        return [program._cache_size() for program in programs]

    before = compiled()
    # Prompts with pictures and without; greedy and sampled tokens. Models share the last two.
    assert before[:3] == [2, 2, 2]
    for length in (3, 17, 64, 101):
        engine.submit(text(length, length), max_new_tokens=length % 7 + 1, keep_cache=True)
    engine.submit(**picture(9, ((1, 8, 12),)), temperature=0.5, seed=3, max_new_tokens=5)
    engine.run()
    assert compiled() == before


def test_a_long_prompt_does_not_stop_the_others(model):
    engine = Engine(model, slots=2, **SHAPE)
    short = engine.submit(text(4, 0), max_new_tokens=40, eos_token_ids=[])
    while not short.tokens:
        engine.step()
    long = engine.submit(text(30 * SHAPE["chunk"], 1), max_new_tokens=2, eos_token_ids=[])
    made = []
    while not long.tokens:
        engine.step()
        made.append(len(short.tokens))
    assert short.done and made[11] == 40  # four tokens a round, while chunks were read
    assert engine.chunks == 31 and len(long.result()) == 2


def test_prompts_take_turns(model):
    engine = Engine(model, slots=2, **SHAPE)
    long = engine.submit(text(20 * SHAPE["chunk"], 1), max_new_tokens=1)
    short = engine.submit(text(2 * SHAPE["chunk"], 2), max_new_tokens=1)
    short.result()
    assert engine.chunks <= 6 and not long.done


def test_a_cache_goes_on(model):
    """A second turn on a kept cache equals both turns at once; the cache is not used up."""
    engine = Engine(model, slots=3, **SHAPE)
    first = engine.submit(**picture(2), max_new_tokens=6, eos_token_ids=[], keep_cache=True)
    said = first.result()
    assert int(first.cache.length[0]) == picture(2)["input_ids"].shape[1] + 5
    more = np.concatenate([said[None, -1:], text(21, 8)], 1)
    second = [
        engine.submit(more, cache=first.cache, max_new_tokens=9, eos_token_ids=[]) for _ in "ab"
    ]
    found = [request.result().tolist() for request in second]
    both = picture(2)
    both["input_ids"] = np.concatenate([both["input_ids"], said[None, :-1], more], 1)
    wanted = engine.submit(**both, max_new_tokens=9, eos_token_ids=[])
    assert found == [wanted.result().tolist()] * 2


def test_caches_equal_the_models(model):
    engine = Engine(model, slots=2, **SHAPE)
    request = engine.submit(text(37, 1), max_new_tokens=1, keep_cache=True)
    other = engine.submit(text(20, 2), max_new_tokens=30, eos_token_ids=[])
    request.result()
    wanted = model(text(37, 1), use_cache=True).cache
    assert request.cache.length.tolist() == [37] and not other.done
    assert request.cache.next_position.tolist() == wanted.next_position.tolist()
    after = model(text(3, 3), cache=request.cache).logits
    assert rel_rms(after, model(text(3, 3), cache=wanted).logits) <= 1e-5


def test_full_attention_has_room_for_max_length():
    model = tiny_model(full_attention_config())
    engine = Engine(model, slots=2, max_length=64, **SHAPE)
    found = engine.submit(text(40, 1), max_new_tokens=24, eos_token_ids=[]).result()
    wanted = model.generate(text(40, 1), max_new_tokens=24, eos_token_ids=[])[0]
    assert found.tolist() == wanted.tolist()
    with pytest.raises(InfiniteVLError, match="may come to 65 tokens.*hold 64"):
        engine.submit(text(41, 1), max_new_tokens=24)


def test_stop_strings(model):
    class Letters:
        def decode(self, ids, skip_special_tokens=False):
            return bytes(i for i in map(int, ids) if i < 256).decode()

    asked = {"max_new_tokens": 40, "eos_token_ids": []}
    engine = Engine(model, slots=2, **SHAPE)
    whole = engine.submit(text(9, 3), **asked).result()
    stop = Letters().decode(whole[5:8])
    found = engine.submit(text(9, 3), **asked, stop_strings=stop, tokenizer=Letters()).result()
    end = Letters().decode(whole).index(stop) + len(stop)
    assert found.tolist() == whole[:end].tolist()


def test_cancelled_and_waiting_requests(model, alone):
    engine = Engine(model, slots=1, waiting=2, **SHAPE)
    first = engine.submit(text(4, 0), max_new_tokens=10**6, eos_token_ids=[])
    second = engine.submit(**REQUESTS[0][0], **REQUESTS[0][1])
    third = engine.submit(text(300, 2), max_new_tokens=3)
    with pytest.raises(InfiniteVLError, match="all 1 slots are taken and 2 requests wait"):
        engine.submit(text(4, 3))
    for _ in range(5):
        engine.step()
    third.cancel()
    first.cancel()
    assert first.cancelled and first.result().tolist() == first.tokens and len(first.tokens) >= 8
    assert second.result().tolist() == alone[0]
    assert engine.busy == 0 and not engine.step()


def test_rows_of_prompts_change_nothing(model, alone):
    """Chunks of several prompts at once; the shape is fixed, whoever comes."""
    engine = Engine(model, slots=3, rows=2, **SHAPE)
    by_two = [engine.submit(**batch, **asked).result().tolist() for batch, asked in REQUESTS]
    greedy = [i for i, (_, asked) in enumerate(REQUESTS) if "seed" not in asked]
    assert [by_two[i] for i in greedy] == [alone[i] for i in greedy]
    requests = [engine.submit(**batch, **asked) for batch, asked in REQUESTS]
    engine.run()
    assert [request.tokens for request in requests] == by_two


def test_open_sequences_grow_in_any_pieces(model):
    engine = Engine(model, slots=3, rows=2, **SHAPE)
    whole, parts = engine.open(), engine.open()
    batch = picture(4, ((1, 4, 4), (1, 12, 8)), ((3, 4, 8),))
    inputs = build_inputs(model.config, **batch)
    whole.extend([(inputs, 0)])
    decoder, length = inputs.decoder, inputs.decoder.tokens.shape[1]
    for at, stop in ((0, 3), (3, 20), (20, length)):
        index = np.arange(stop - at, dtype=np.int32)[None]
        cut = decoder._replace(
            tokens=decoder.tokens[:, at:stop],
            token_index=index,
            segment_ids=decoder.segment_ids[:, at:stop],
            positions=decoder.positions[:, :, at:stop],
            vision_index=decoder.vision_index[:, at:stop],
        )
        parts.extend([(inputs._replace(decoder=cut), 0)])
    question = text(9, 1)
    answers = [
        engine.submit(question, cache=s.cache(), max_new_tokens=8, eos_token_ids=[]).result()
        for s in (whole, parts)
    ]
    np.testing.assert_array_equal(*answers)
    before = whole.cache()
    engine.submit(question, cache=before, max_new_tokens=20, eos_token_ids=[]).result()
    jax.tree.map(np.testing.assert_array_equal, before, whole.cache())
    assert before.length.tolist() == [length]
    with pytest.raises(InfiniteVLError, match="none of the 3 slots"):
        engine.open(), engine.open()
    whole.close()
    with pytest.raises(InfiniteVLError, match="was closed"):
        whole.extend([(inputs, 0)])
    engine.open(before).close()


@pytest.mark.parametrize(
    "asked, culprit",
    [
        ({"input_ids": np.full((2, 3), 97)}, "2 rows"),
        ({"input_ids": text(3, 0), "streamer": object()}, "streamer"),
        ({"input_ids": text(3, 0), "eos_token_ids": list(range(17))}, "17 ids"),
        ({"input_ids": text(3, 0), "temperature": -1}, "temperature"),
        ({"input_ids": text(3, 0), "max_tokens": 1}, "max_tokens"),
        ({"input_ids": np.array([[10**6]])}, "1000000"),
    ],
)
def test_bad_requests_are_named_and_leave_the_others_alone(model, asked, culprit):
    engine = Engine(model, slots=1, **SHAPE)
    good = engine.submit(text(4, 0), max_new_tokens=3)
    with pytest.raises(InfiniteVLError, match=culprit):
        engine.submit(**asked)
    assert len(good.result()) == 3


def test_a_cache_of_something_else_is_named(model):
    engine = Engine(model, slots=1, **SHAPE)
    other = tiny_model(tiny_config(num_linear_heads=4))
    for cache in (other.init_cache(1), model.init_cache(2)):
        with pytest.raises(InfiniteVLError, match="the cache is another model's, or not of one"):
            engine.submit(text(3, 0), cache=cache)
        with pytest.raises(InfiniteVLError, match="the cache is another model's, or not of one"):
            engine.open(cache)
    assert engine.busy == 0


def test_no_tokens_wanted(model):
    assert Engine(model, slots=1, **SHAPE).submit(text(4, 0), max_new_tokens=0).result().size == 0
