"""A stream is one long video in constant memory: it equals the prompt that holds all of it."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_folder import full_attention_config, tiny_config, tiny_model, write_tokenizer

from infinitevl_jax import InfiniteVLError, Processor
from infinitevl_jax.processing.images import process_image
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.video_stream import VideoStream
from pallas_kernels.testing.parity import rel_rms

SHAPE = {"chunk": 16, "steps": 4, "patches": 32}
ASKED = {"max_new_tokens": 12, "eos_token_ids": []}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


def frame(seed, size=(12, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def watched(model, processor, frames, step=0.7, slots=2, **shape):
    stream = VideoStream(Engine(model, slots=slots, **SHAPE | shape), processor)
    for i in range(frames):
        stream.push(frame(i), i * step)
    return stream


def answer(stream, question="why?", **asked):
    return "".join(stream.ask(question, **ASKED | asked))


def test_it_equals_the_whole_video_as_a_prompt(model, processor):
    frames, step = 7, 0.7
    stream = watched(model, processor, frames, step)
    patches, (grid, *_) = zip(
        *[process_image(frame(i), processor.images) for i in range(frames)], strict=True
    )
    video, config = model.config.video_token_id, model.config
    tokens = frames * len(patches[0]) // config.vision.merge_unit
    opening, closing = stream._around("why?")
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
def test_any_grouping_gives_the_same_state(model, processor, shape):
    wanted = watched(model, processor, 6)._sequence.cache()
    stream = VideoStream(Engine(model, slots=2, **SHAPE | shape), processor)
    for i in range(6):
        stream.push(frame(i), i * 0.7, wait=i % 3 == 2)
    found = stream._sequence.cache()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert rel_rms(np.asarray(a, np.float64), np.asarray(b, np.float64)) <= 1e-5


def test_a_question_changes_nothing(model, processor):
    stream = watched(model, processor, 5)
    before = jax.tree.map(np.asarray, stream._sequence.cache())
    first = answer(stream)
    assert answer(stream, "who?") != "" and answer(stream) == first
    half = stream.ask("why?", **ASKED)
    next(half)
    half.close()
    jax.tree.map(np.testing.assert_array_equal, before, stream._sequence.cache())
    assert stream.engine.busy == 1
    stream.push(frame(5), 3.5)
    assert answer(stream) == answer(watched(model, processor, 6))


def test_its_memory_does_not_grow(model, processor):
    short, long = watched(model, processor, 2), watched(model, processor, 40)
    assert short._sequence.cache().nbytes == long._sequence.cache().nbytes
    assert long.frames == 40 and np.isfinite(np.asarray(long._sequence.cache().layers[1][0])).all()


def test_saved_and_loaded_it_goes_on(model, processor, tmp_path):
    stream = watched(model, processor, 4)
    stream.save(tmp_path / "stream.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stream.safetensors"]
    size = (tmp_path / "stream.safetensors").stat().st_size
    engine = Engine(model, slots=2, **SHAPE)
    again = VideoStream.load(tmp_path / "stream.safetensors", engine, processor)
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
    streams = [VideoStream(engine, processor) for _ in range(3)]
    for i in range(4):
        for offset, stream in enumerate(streams):
            stream.push(frame(i + 10 * offset), i * 0.7, wait=False)
        engine.run()
    alone = []
    for offset in range(3):
        stream = VideoStream(Engine(model, slots=4, rows=3, **SHAPE), processor)
        for i in range(4):
            stream.push(frame(i + 10 * offset), i * 0.7)
        alone.append(jax.tree.map(np.asarray, stream._sequence.cache()))
    for stream, wanted in zip(streams, alone, strict=True):
        jax.tree.map(np.testing.assert_array_equal, stream._sequence.cache(), wanted)


def test_frames_that_come_too_fast_are_dropped_and_counted(model, processor):
    stream = VideoStream(Engine(model, slots=2, **SHAPE), processor, waiting=3)
    for i in range(8):
        stream.push(frame(i), float(i), wait=False)
    assert (stream.frames, stream.dropped) == (3, 5)
    kept = VideoStream(Engine(model, slots=2, **SHAPE), processor)
    kept._first = 0.0
    for i in range(5, 8):
        kept.push(frame(i), float(i))
    assert answer(stream) == answer(kept)


def test_frames_of_any_size(model, processor):
    stream = VideoStream(Engine(model, slots=2, **SHAPE), processor)
    for i, size in enumerate([(8, 8), (31, 17), (200, 300), (1, 9), (16, 16)]):
        stream.push(frame(i, size), i)
    assert stream.frames == 5 and len(answer(stream)) > 0


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
    other = tiny_model(dataclasses.replace(model.config, initializer_range=0.25))
    for name, engine, culprit in (
        ("cut", stream.engine, "cut"),
        ("odd", stream.engine, "no saved stream"),
        ("good", Engine(other, **SHAPE), "another model"),
    ):
        with pytest.raises(InfiniteVLError, match=culprit):
            VideoStream.load(tmp_path / name, engine, processor)
    assert VideoStream.load(tmp_path / "good", stream.engine, processor).frames == 1
