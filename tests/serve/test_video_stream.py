"""A stream is one long video in constant memory: it equals the prompt that holds all of it."""

import dataclasses
import errno
import os

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_folder import full_attention_config, tiny_config, tiny_model, write_tokenizer

from infinitevl_jax import InfiniteVL, InfiniteVLError, Processor
from infinitevl_jax.config.model import FULL
from infinitevl_jax.processing.images import load_image, process_image, resize_image
from infinitevl_jax.rational import exact
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.video_stream import VideoStream
from pallas_kernels.testing.parity import rel_rms

SHAPE = {"chunk": 16, "steps": 4, "patches": 32}
FRAME = 6  # tokens of `frame(seed)`
ASKED = {"max_new_tokens": 12, "eos_token_ids": []}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def compiled(model):
    return Engine(model, slots=4, **SHAPE)


@pytest.fixture
def shared(compiled):
    """An engine whose programs all tests use; what they leave open is closed."""
    yield compiled
    for held in compiled._held:
        if held is not None:
            held.close()


def frame(seed, size=(12, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def watched(engine, processor, frames, step=0.7):
    stream = engine.open_stream(processor)
    for i in range(frames):
        stream.push(frame(i), i * step)
    return stream


def answer(stream, question="why?", **asked):
    return "".join(stream.ask(question, **ASKED | asked))


def test_it_equals_the_whole_video_as_a_prompt(model, shared, processor):
    frames, step = 7, 0.7
    stream = watched(shared, processor, frames, step)
    patches, (grid, *_) = zip(
        *[process_image(frame(i), processor.videos) for i in range(frames)], strict=True
    )
    video, config = model.config.video_token_id, model.config
    tokens = frames * len(patches[0]) // config.vision.merge_unit
    opening, closing = stream._layout.opening, stream._layout.closing("why?")
    batch = {
        "input_ids": np.concatenate([opening, np.full(tokens, video), closing])[None],
        "pixel_values_videos": np.concatenate(patches),
        "video_grid_thw": np.array([[frames, *grid[1:]]]),
        "second_per_grid_ts": np.array([step]),
    }
    wanted = model.generate(**batch, **ASKED)[0]
    assert answer(stream) == processor.decode(wanted)
    before = model(
        **batch | {"input_ids": batch["input_ids"][:, : -len(closing)]}, use_cache=True
    ).cache
    found = stream._sequence.cache()
    assert found.length.tolist() == before.length.tolist()
    assert found.next_position.tolist() == before.next_position.tolist()
    question = closing[None]
    logits = [model(question, cache=cache).logits for cache in (found, before)]
    assert rel_rms(*logits) <= 1e-5


@pytest.mark.parametrize("shape", [{"chunk": 5}, {"chunk": 64}, {"rows": 2}])
def test_any_grouping_gives_the_same_state(model, shared, processor, shape):
    wanted = watched(shared, processor, 6)._sequence.cache()
    stream = VideoStream(Engine(model, slots=2, **SHAPE | shape), processor)
    for i in range(6):
        stream.push(frame(i), i * 0.7, wait=i % 3 == 2)
    found = stream._sequence.cache()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert rel_rms(np.asarray(a, np.float64), np.asarray(b, np.float64)) <= 1e-5


def test_a_frame_is_read_at_once(shared, processor):
    """The first too, which comes while the text before it waits."""
    stream = shared.open_stream(processor)
    opening = len(stream._layout.opening)
    for number in (1, 2, 3):
        stream.push(frame(number), number)
        assert not stream._sequence.reading and not stream._queue
        assert stream._sequence.cache().length.tolist() == [opening + FRAME * number]


def test_a_question_changes_nothing(shared, processor):
    stream = watched(shared, processor, 5)
    before = jax.tree.map(np.asarray, stream._sequence.cache())
    first = answer(stream)
    assert answer(stream, "who?") != "" and answer(stream) == first
    half = stream.ask("why?", **ASKED)
    next(half)
    half.close()
    jax.tree.map(np.testing.assert_array_equal, before, stream._sequence.cache())
    assert stream.engine.busy == 1
    stream.push(frame(5), 3.5)
    assert answer(stream) == answer(watched(shared, processor, 6))


def test_its_memory_does_not_grow(shared, processor):
    short, long = watched(shared, processor, 2), watched(shared, processor, 40)
    assert short._sequence.cache().nbytes == long._sequence.cache().nbytes
    assert long.frames == 40 and np.isfinite(np.asarray(long._sequence.cache().layers[1][0])).all()


def test_saved_and_loaded_it_goes_on(shared, processor, tmp_path):
    stream = watched(shared, processor, 4)
    stream.save(tmp_path / "stream.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stream.safetensors"]
    size = (tmp_path / "stream.safetensors").stat().st_size
    again = VideoStream.load(tmp_path / "stream.safetensors", shared, processor)
    jax.tree.map(np.testing.assert_array_equal, stream._sequence.cache(), again._sequence.cache())
    assert (again.frames, again.dropped, again.seconds) == (4, 0, stream.seconds)
    for one in (stream, again):
        one.push(frame(9), 2.8)
    assert answer(stream) == answer(again)
    again.save(tmp_path / "stream.safetensors")  # in place of the old one
    assert (tmp_path / "stream.safetensors").stat().st_size < size + 64


def test_streams_side_by_side(model, processor):
    """In one engine, frames read together, each as alone."""
    engine = Engine(model, slots=4, rows=3, **SHAPE)
    streams = [engine.open_stream(processor) for _ in range(3)]
    for i in range(4):
        for offset, stream in enumerate(streams):
            stream.push(frame(i + 10 * offset), i * 0.7, wait=False)
        engine.run()
    together = [jax.tree.map(np.asarray, stream._sequence.cache()) for stream in streams]
    for stream in streams:
        stream.close()
    for offset, found in enumerate(together):
        stream = engine.open_stream(processor)
        for i in range(4):
            stream.push(frame(i + 10 * offset), i * 0.7)
        jax.tree.map(np.testing.assert_array_equal, found, stream._sequence.cache())
        stream.close()


def test_frames_that_come_too_fast_are_dropped_and_counted(shared, processor):
    stream = shared.open_stream(processor, waiting=3)
    for i in range(8):
        stream.push(frame(i), float(i), wait=False)
    assert (stream.frames, stream.dropped) == (3, 5)
    kept = shared.open_stream(processor)
    kept._first = 0.0
    for i in range(5, 8):
        kept.push(frame(i), float(i))
    assert answer(stream) == answer(kept)


def test_frames_of_any_size(shared, processor):
    stream = shared.open_stream(processor)
    for i, size in enumerate([(8, 8), (31, 17), (200, 300), (1, 9), (16, 16)]):
        stream.push(frame(i, size), i)
    assert stream.frames == 5 and len(answer(stream)) > 0


def quick(model):
    """The model as if its video had many positions a second."""
    vision = dataclasses.replace(model.config.vision, tokens_per_second=1000.0)
    return InfiniteVL(dataclasses.replace(model.config, vision=vision), model.params)


def test_a_full_disk(shared, processor, tmp_path, monkeypatch):
    """The file that was there stays, and so does the stream."""
    stream = shared.open_stream(processor)
    for i in range(2):
        stream.push(frame(i), i * 0.7)
    stream.save(tmp_path / "memory")
    before = (tmp_path / "memory").read_bytes()
    stream.push(frame(2), 1.4)
    whole, write = answer(stream), os.pwrite

    def full(file, data, place):
        if place > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(InfiniteVLError, match="no space left") as raised:
            stream.save(tmp_path / "memory")
    assert "save it again" in raised.value.cure
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert (tmp_path / "memory").read_bytes() == before
    assert answer(stream) == whole
    stream.save(tmp_path / "memory")
    stream.close()
    again = VideoStream.load(tmp_path / "memory", stream.engine, processor)
    assert again.frames == 3 and answer(again) == whole


def test_a_model_that_keeps_everything_has_an_end(processor):
    """Frames and questions that have no room are refused; the stream goes on without them."""
    config = tiny_config(layer_types=(FULL, FULL))
    engine = Engine(tiny_model(config), slots=2, max_length=110, **SHAPE)
    stream = engine.open_stream(processor)
    opening = len(stream._layout.opening)
    fit = (110 - opening) // FRAME
    assert fit >= 2
    for i in range(fit):
        stream.push(frame(i), i)
    for _ in range(2):
        with pytest.raises(InfiniteVLError, match="the engine's slots hold 110"):
            stream.push(frame(9), 100)
    with pytest.raises(InfiniteVLError, match="may come to .* slots hold 110"):
        stream.ask("why? " * 20, **ASKED)
    assert (stream.frames, stream.seconds) == (fit, fit - 1)
    assert stream._sequence.cache().length.tolist() == [opening + FRAME * fit]


def test_a_frame_as_large_as_it_should_be_is_taken_as_it_is(model, processor, monkeypatch):
    stream = Engine(model, slots=1, **SHAPE).open_stream(processor)
    options = processor.videos
    fits = resize_image(frame(0, (64, 64)), options)
    assert stream._pixels(fits) is fits
    for other in (np.asarray(frame(1, (50, 70))), fits[:, ::-1][:33], np.asfortranarray(fits)):
        want = resize_image(load_image(other), options)
        np.testing.assert_array_equal(stream._pixels(other), want)
    monkeypatch.setattr("infinitevl_jax.serve.video_stream.MAX_RESIZED_PIXELS", fits.size // 3 - 1)
    monkeypatch.setattr("infinitevl_jax.processing.images.MAX_RESIZED_PIXELS", fits.size // 3 - 1)
    with pytest.raises(InfiniteVLError, match="over the limit"):
        stream.push(fits, 0.0)


def test_the_format_of_the_reference(model, shared, processor):
    """Tokens and positions as the authors' streaming program has them, for 16 x 16 tokens."""
    big = Processor(
        processor.tokenizer,
        processor.template,
        processor.images,
        dataclasses.replace(processor.videos, min_pixels=64, max_pixels=64 * 64),
    )
    stream = shared.open_stream(big, layout="reference")
    seen = []
    for seconds in (0.0, 0.5, 0.96, 1.0, 9.04):
        inputs = stream._frame(stream._pixels(frame(0, (64, 64))), exact(seconds))
        positions = inputs.decoder.positions
        assert positions.shape == (3, 1, 256)
        assert (inputs.decoder.tokens == model.config.image_token_id).all()
        for axis in (1, 2):
            assert sorted(set(positions[axis, 0])) == list(range(2, 18))
        seen += set(positions[0, 0])
    assert seen == [2, 2, 2, 4, 20]
    for seconds, following in ((0.0, 18), (7.5, 18), (8.2, 19)):
        stream.push(frame(1, (64, 64)), seconds)
        cache = stream._sequence.cache()
        assert cache.next_position.tolist() == [following]
    assert cache.length.tolist() == [1 + 3 * 256]
    ids = stream._layout.closing("why?")
    template = processor([{"role": "user", "content": "why?"}])["input_ids"][0]
    assert ids.tolist() == [model.config.vision_end_token_id, *template]
    assert stream._layout.opening.tolist() == [model.config.vision_start_token_id]
    assert answer(stream) != ""
    with pytest.raises(InfiniteVLError, match="layout is 'other'"):
        shared.open_stream(big, layout="other")
    assert shared.busy == 1


def test_a_system_message_is_kept(shared, processor, tmp_path):
    stream = shared.open_stream(processor, system="Be brief.")
    stream.push(frame(0), 3.25)
    stream.save(tmp_path / "memory")
    again = VideoStream.load(tmp_path / "memory", shared, processor)
    assert again.system == "Be brief." and again._layout.base == stream._layout.base
    assert "Be brief." in processor.decode(again._layout.opening)
    for one in (stream, again):
        one.push(frame(1), 4.5)
    jax.tree.map(np.testing.assert_array_equal, stream._sequence.cache(), again._sequence.cache())


def test_mistakes_are_named_and_the_stream_lives_on(model, processor, tmp_path):
    stream = VideoStream(Engine(model, slots=1, **SHAPE), processor)
    with pytest.raises(InfiniteVLError, match="no frame was pushed"):
        stream.ask("why?")
    stream.push(frame(0), 1.0)
    before = jax.tree.map(np.asarray, stream._sequence.cache())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for bad, seconds, culprit in (
        (frame(1), 0.5, "0.5 s came after one at 1 s"),
        (frame(1), float("nan"), "seconds"),
        (tmp_path / "broken.png", 2.0, "the frame is not a picture"),
        (np.zeros((3, 3)), 2.0, "the frame"),
    ):
        with pytest.raises(InfiniteVLError, match=culprit):
            stream.push(bad, seconds)
    jax.tree.map(np.testing.assert_array_equal, before, stream._sequence.cache())
    with pytest.raises(InfiniteVLError, match="none of the 1 slots"):
        VideoStream(stream.engine, processor)
    with pytest.raises(InfiniteVLError, match="open sequences hold all 1 slots"):
        stream.ask("why?")
    with pytest.raises(InfiniteVLError, match="comes to position"):
        VideoStream(Engine(quick(model), **SHAPE), processor)._frame(frame(0), 10**9)
    with pytest.raises(InfiniteVLError, match="no vision tower|text model"):
        VideoStream(Engine(tiny_model(full_attention_config()), max_length=64), processor)
    with pytest.raises(InfiniteVLError, match="No such file"):
        stream.save(tmp_path / "nowhere" / "x")
    stream.save(tmp_path / "good")
    stream.close()
    with pytest.raises(InfiniteVLError, match="was closed"):
        stream.push(frame(1), 3.0)
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "odd").write_bytes(whole.replace(b'"stream"', b'"scream"'))
    (tmp_path / "early").write_bytes(whole.replace(b'seconds\\": 1.0', b'seconds\\": -10'))
    trained = tiny_model(model.config, seed=1)
    for name, engine, culprit in (
        ("cut", stream.engine, "cut"),
        ("odd", stream.engine, "no saved stream"),
        ("early", stream.engine, "seconds: -10"),
        ("good", Engine(quick(model), **SHAPE), "another model"),
        ("good", Engine(trained, **SHAPE), "another model"),
    ):
        with pytest.raises(InfiniteVLError, match=culprit):
            VideoStream.load(tmp_path / name, engine, processor)
    assert VideoStream.load(tmp_path / "good", stream.engine, processor).frames == 1
