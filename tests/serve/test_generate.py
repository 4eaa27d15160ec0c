"""Generation: greedy against repeated full calls, batches, end tokens, streaming, chunks, branches
of one cache, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import conversation, hybrid_config

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import save_params
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.serve import decoding
from infinitevl_jax.serve.encoding import group_encoder
from infinitevl_jax.serve.sampling import Sampling, Settings, choose
from infinitevl_jax.serve.slots import Slots
from pallas_kernels.testing.parity import rel_rms

NEW = 6
NEVER = [-1]  # no token: nothing ends
WARM = Sampling(temperature=1.5, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def model():
    config = hybrid_config(layers=2, window=8, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    shapes = parameters(config, scanned=False)
    return InfiniteVL(
        config,
        {
            name: jnp.asarray(rng.normal(scale=0.4, size=s.shape), "float32")
            for name, s in shapes.items()
        },
    )


@pytest.fixture(scope="module")
def prompt(model):
    """One row with an image and a video."""
    return conversation(model.config, text=10)


@pytest.fixture(scope="module")
def greedy(model, prompt):
    return model.generate(**prompt, max_new_tokens=NEW, eos_token_ids=NEVER)


def test_two_thousand_tokens_past_the_window(model):
    """Each is the likeliest in a call with all of them and no cache, whose window is 8."""
    prompt = np.random.default_rng(5).integers(1, 90, (1, 30))
    made = model.generate(prompt, max_new_tokens=2_000, eos_token_ids=NEVER)
    logits = np.asarray(model(np.concatenate([prompt, made], 1)).logits)
    assert made.shape == (1, 2_000) and len(set(made[0])) > 20
    np.testing.assert_array_equal(logits[:, 29:-1].argmax(-1), made)


def ragged(prompt, side="left"):
    """The prompt and two texts, far from equally long."""
    rng = np.random.default_rng(3)
    rows = [prompt["input_ids"][0], rng.integers(1, 90, 3), rng.integers(1, 90, 20)]
    width = max(map(len, rows))
    ids, mask = np.zeros((3, width), int), np.zeros((3, width), int)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return prompt | {"input_ids": ids, "attention_mask": mask}, rows


@pytest.fixture(scope="module")
def together(model, prompt):
    return model.generate(**ragged(prompt)[0], max_new_tokens=NEW, eos_token_ids=NEVER)


def test_greedy_is_the_argmax_of_repeated_full_calls(model, prompt, greedy):
    ids = prompt["input_ids"]
    for _ in range(NEW):
        best = np.asarray(model(**prompt | {"input_ids": ids}).logits)[:, -1].argmax(-1)
        ids = np.concatenate([ids, best[:, None]], 1)
    assert greedy.dtype == np.int32 and greedy.shape == (1, NEW) and len(set(greedy[0])) == NEW
    np.testing.assert_array_equal(greedy, ids[:, -NEW:])


def test_a_ragged_batch_equals_single_prompts(model, prompt, greedy, together):
    batch, rows = ragged(prompt, "right")
    np.testing.assert_array_equal(
        model.generate(**batch, max_new_tokens=NEW, eos_token_ids=NEVER), together
    )
    alone = [
        greedy[0],
        *(
            model.generate(row[None], max_new_tokens=NEW, eos_token_ids=NEVER)[0]
            for row in rows[1:]
        ),
    ]
    np.testing.assert_array_equal(together, alone)


def test_stops_at_an_end_token_and_pads_after_it(model, prompt, together):
    end = int(together[0, 2])
    expected = together.copy()
    expected[0, 3:] = model.config.pad_token_id
    assert end not in together[1:]  # the other rows go on
    batch, _ = ragged(prompt)
    np.testing.assert_array_equal(
        model.generate(**batch, max_new_tokens=NEW, eos_token_ids=[end]), expected
    )
    # with every row at its end nothing more is made
    assert model.generate(**prompt, max_new_tokens=NEW, eos_token_ids=[end]).tolist() == [
        together[0, :3].tolist()
    ]


def test_end_tokens_come_from_the_configuration(model, prompt, greedy, monkeypatch):
    monkeypatch.setattr(
        model, "config", dataclasses.replace(model.config, eos_token_ids=(int(greedy[0, 1]),))
    )
    assert model.generate(**prompt, max_new_tokens=NEW).tolist() == [greedy[0, :2].tolist()]


def test_a_sequence_that_has_ended_leaves_its_cache_as_it_is(model, prompt, greedy):
    """The cache that `decode` gives has every token but the one that ended the sequence, bit for
    bit."""

    def after(count, ends):
        logits, cache = model.prefill(build_inputs(model.config, **prompt), model.init_cache(1))
        made = model.decode(logits, cache, max_new_tokens=NEW, eos_token_ids=ends)
        return jax.tree.map(
            np.asarray, [cache for _, (_, cache) in zip(range(count), made, strict=False)][-1]
        )

    stopped, before = after(4, [int(greedy[0, 3])]), after(3, NEVER)
    assert stopped.length.tolist() == [prompt["input_ids"].shape[1] + 3]
    jax.tree.map(np.testing.assert_array_equal, stopped, before)


def test_stream_gives_tokens_as_they_are_made(model, prompt, greedy, monkeypatch):
    launched, decode = [], model.programs.decode

    def spy(*args, steps, sampled):
        launched.extend([1] * steps)
        return decode(*args, steps=steps, sampled=sampled)

    monkeypatch.setattr(model.programs, "decode", spy)
    seen = []
    for token in model.stream(**prompt, max_new_tokens=NEW, eos_token_ids=NEVER):
        seen.append(token)
        assert len(launched) == min(len(seen), NEW - 1)  # one step ahead, no more
    np.testing.assert_array_equal(np.stack(seen, 1), greedy)
    assert model.generate(**prompt, max_new_tokens=0).shape == (1, 0)


def test_generate_waits_for_the_host_once_in_eight_tokens(model, prompt, greedy, monkeypatch):
    """The last launch may make more steps than tokens are left; with all ended, there is no
    further launch."""
    launches, decode = [], model.programs.decode

    def spy(*args, steps, sampled):
        launches.append(steps)
        return decode(*args, steps=steps, sampled=sampled)

    monkeypatch.setattr(model.programs, "decode", spy)
    before = decode._cache_size()
    made = model.generate(**prompt, max_new_tokens=20, eos_token_ids=NEVER)
    np.testing.assert_array_equal(made[:, :NEW], greedy)
    assert launches == [8, 8, 8] and made.shape == (1, 20)
    launches.clear()
    ends = [*range(200, 300), int(made[0, 2])]  # more than an engine takes
    np.testing.assert_array_equal(
        model.generate(**prompt, max_new_tokens=64, eos_token_ids=ends), made[:, :3]
    )
    assert launches == [8, 8] and decode._cache_size() == before + 1  # for so many ends


def test_a_prompt_in_several_chunks_equals_one(model, prompt, together, monkeypatch):
    """Chunks of 16 cut through the image and the video; the second row ends in the first of
    them."""
    batch, rows = ragged(prompt)
    whole, _ = model.prefill(build_inputs(model.config, **batch), model.init_cache(3))
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 16)
    parts, cache = model.prefill(build_inputs(model.config, **batch), model.init_cache(3))
    assert rel_rms(parts, whole) <= 1e-5
    assert cache.length.tolist() == [len(row) for row in rows]
    np.testing.assert_array_equal(
        model.generate(**batch, max_new_tokens=NEW, eos_token_ids=NEVER), together
    )


def test_images_of_a_batch_are_encoded_in_groups(model, prompt, monkeypatch):
    """Two prompts of a video each: no call has more patches than a group, whatever their number."""
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 16)
    double = {
        name: np.concatenate([value] * 2) if isinstance(value, np.ndarray) else value * 2
        for name, value in prompt.items()
    }
    inputs, sizes = build_inputs(model.config, **double), []
    whole, _ = model.prefill(inputs, model.init_cache(2))
    run, encoder = model.programs, group_encoder(model.programs, model.params, model.config, 24)

    def encode(patches):
        sizes.append(int((patches.patch_index >= 0).sum()))
        return encoder.encode(patches)

    small = dataclasses.replace(encoder, encode=encode)
    parts, _ = decoding.prefill(run, model.params, inputs, model.init_cache(2), small)
    assert rel_rms(parts, whole) <= 1e-5
    slices = [60, 24, 24, 24] * 2  # of an image and a video
    assert sorted(sizes) == sorted(slices) and inputs.patches.pixels.shape[1] >= sum(slices)


def test_rows_of_a_batch_draw_by_themselves(model):
    """Equal rows get different tokens; the first gets those of a batch of one."""
    row = np.array([[5, 6, 7]])
    asked = {"max_new_tokens": NEW, "eos_token_ids": NEVER, "sampling": WARM, "seed": 3}
    made = model.generate(np.repeat(row, 3, 0), **asked)
    assert len({tuple(tokens) for tokens in made.tolist()}) == 3
    assert made[:1].tolist() == model.generate(row, **asked).tolist()


def test_sampling_is_reproducible_by_seed(model, prompt):
    def sample(seed):
        return model.generate(
            **prompt, max_new_tokens=NEW, eos_token_ids=NEVER, sampling=WARM, seed=seed
        ).tolist()

    assert sample(1) == sample(1) and sample(1) != sample(2)


LOGITS = np.log(np.array([0.4, 0.25, 0.2, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.25, 0.2, 0.1, 0.05]),
        (
            Sampling(temperature=0.5),
            np.square([0.4, 0.25, 0.2, 0.1, 0.05]) / np.square([0.4, 0.25, 0.2, 0.1, 0.05]).sum(),
        ),
        (Sampling(temperature=1.0, top_k=2), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.4, 0.25, 0.2, 0.1, 0.05]),
        (
            Sampling(temperature=1.0, top_p=0.6),
            [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0],
        ),  # the least set that reaches 0.6
        (Sampling(temperature=1.0, top_p=0.3), [1, 0, 0, 0, 0]),
        (
            Sampling(temperature=1.0, top_k=3, top_p=0.8),
            [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0, 0],
        ),
        (Sampling(temperature=0.0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1e-30), [1, 0, 0, 0, 0]),
    ],
)
def test_sampled_tokens_have_the_distribution_asked_for(sampling, expected):
    count = 20_000
    order = np.array([3, 0, 4, 1, 2])  # nothing may depend on the tokens being sorted
    tokens = np.asarray(
        jax.jit(choose)(
            jnp.asarray(np.tile(LOGITS[order], (count, 1)) + 7, "float32"),
            np.stack([np.zeros(count, np.uint32), np.arange(count, dtype=np.uint32)], 1),
            np.zeros(count, np.int32),
            Settings.of([sampling] * count),
            np.zeros((count, 5), bool),
        )
    )
    seen = np.bincount(order[tokens], minlength=5) / count
    expected = np.asarray(expected)
    assert (seen[expected == 0] == 0).all()
    np.testing.assert_allclose(seen, expected, atol=5 * 0.5 / np.sqrt(count))


def test_a_mesh_of_eight_devices_generates_the_same(model, prompt, greedy, tmp_path):
    from infinitevl_jax.config.run import RunConfig
    from infinitevl_jax.sharding import make_mesh

    save_params(tmp_path / "nn", model.params, model.config)
    mesh = make_mesh(RunConfig(data=1, fsdp=4, tensor=2))
    spread = InfiniteVL.from_pretrained(tmp_path / "nn", mesh=mesh)
    embedding = spread.params["embed_tokens.embedding"]
    assert (
        len(embedding.sharding.device_set) == 8
        and embedding.addressable_shards[0].data.size == embedding.size // 8
    )
    np.testing.assert_array_equal(
        spread.generate(**prompt, max_new_tokens=NEW, eos_token_ids=NEVER), greedy
    )
    assert all(
        leaf.addressable_shards[0].data.shape[0] == 1
        for leaf in jax.tree.leaves(spread.init_cache(4).layers)
    )
    one = InfiniteVL.from_pretrained(tmp_path / "nn")
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), dict(one.params), dict(model.params))
    )


def test_profiles_name_the_stages(model, prompt):
    """Prefill, decoding and sampling are scopes in the names of the compiled programs."""
    inputs, cache = build_inputs(model.config, **prompt), model.init_cache(1)
    run, params = model.programs, model.params
    embeds = run.encode(params, inputs.patches)
    text = run.forward.lower(params, inputs.decoder, embeds, cache).as_text(debug_info=True)
    assert "/prefill/" in text and "/decode/" not in text
    slots = Slots.idle(1, model.config.text.vocab_size)
    text = run.decode.lower(params, cache, slots, steps=1).as_text(debug_info=True)
    assert "decode/sampling/" in text and "/prefill/" not in text
