"""`infinitevl stream`: answers with their times on stdout, the rest on stderr."""

import functools
import io
import re

import numpy as np
import pytest
from PIL import Image

from infinitevl_jax import InfiniteVLError, Processor
from infinitevl_jax.cli import stream as command
from infinitevl_jax.cli.stream import Question, questions
from infinitevl_jax.processing.frames import film_frames
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.video_stream import VideoStream

FEW = ("--max-new-tokens", 6, "--no-compilation-cache")


@pytest.fixture(scope="module")
def compiled(model):
    """engine(model, settings): one for equal settings, whose programs all tests use."""

    @functools.cache
    def engine(**settings):
        return Engine(model, **settings)

    return lambda _, **settings: engine(**settings)


@pytest.fixture(autouse=True)
def one_engine(monkeypatch, compiled):
    monkeypatch.setattr(command, "Engine", compiled)


@pytest.fixture
def engine(model, compiled):
    return compiled(model, slots=2, max_length=32768, chunk=64)


@pytest.fixture
def wanted(folder, film, engine):
    """answers(times) of the Python interface, asked after the frames up to each time."""
    processor = Processor.from_pretrained(folder)

    def answers(*times, question="why?", fps=2):
        stream, found, asked = engine.open_stream(processor), [], list(times)
        for seconds, image in film_frames(film, fps)[1]:
            while asked and asked[0] < seconds:
                asked.pop(0)
                found.append("".join(stream.ask(question, max_new_tokens=6)))
            stream.push(image, float(seconds))
        found += ["".join(stream.ask(question, max_new_tokens=6)) for _ in asked]
        stream.close()
        return found

    return answers


def test_questions():
    found = questions(["What is it?", "12.5: who came? At 5: no", "3:why", " .5 : x", "At 7: y"])
    assert found == [
        Question(0.5, "x"),
        Question(3, "why"),
        Question(12.5, "who came? At 5: no"),
        Question(float("inf"), "What is it?"),
        Question(float("inf"), "At 7: y"),
    ]
    for text in ("", "  ", "3: "):
        with pytest.raises(InfiniteVLError, match="has no question"):
            questions([text])


def test_answers_come_at_their_times(run, folder, film, wanted):
    """6 frames, 2 a second; a question sees the frames up to its time."""
    asked = ("--ask", "why?", "--ask", "1: why?", "--ask", "1.2: why?", "--ask", "99: why?")
    result = run("stream", folder, film, *asked, *FEW)
    assert result.exit_code == 0, result.stderr
    first, again, late, end = wanted(1, 1.2, 99, 100)
    assert result.stdout == f"1 s: {first}\n1 s: {again}\n2.5 s: {late}\n2.5 s: {end}\n"
    assert first == again and late == end
    for said in ("computing in float32", "frames of 16 x 16 pixels, 16 tokens each", "1 s: why?"):
        assert said in result.stderr, result.stderr
    assert re.search(r"6 frames up to 2.5 s, [\d.]+ a second", result.stderr)


def test_a_rate_and_smaller_frames(run, folder, film):
    result = run("stream", folder, film, "--fps", 1, "--max-pixels", 64, "--ask", "why?", *FEW)
    assert result.exit_code == 0 and result.stdout.startswith("2 s: ")
    assert "8 x 8 pixels, 4 tokens" in result.stderr and "3 frames up to 2 s" in result.stderr


def test_memory_is_saved_and_goes_on(run, folder, film, engine, tmp_path):
    """Two films, the second behind the first, are the stream of both."""
    memory = tmp_path / "memory.safetensors"
    first = run("stream", folder, film, "--save", memory, *FEW)
    assert first.exit_code == 0 and first.stdout == "" and f"memory is in {memory}" in first.stderr
    second = run("stream", folder, film, "--load", memory, "--ask", "why?", "--save", memory, *FEW)
    assert second.exit_code == 0 and "6 frames" in second.stderr
    stream = VideoStream.load(memory, engine, Processor.from_pretrained(folder))
    assert (stream.frames, stream.seconds) == (12, 5.5)
    assert second.stdout == "2.5 s: " + "".join(stream.ask("why?", max_new_tokens=6)) + "\n"
    stream.close()
    for option in (("--system", "Be brief."), ("--layout", "reference")):
        result = run("stream", folder, film, "--load", memory, *option)
        assert result.exit_code == 2 and f"{option[0]} came with --load" in result.stderr


def jpegs(count, size=(16, 16)):
    out = io.BytesIO()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(out, "JPEG")
        size = (size[0] + 9, size[1])
    return out.getvalue()


def test_standard_input(run, folder, tmp_path):
    """Motion JPEG of changing sizes, raw frames, and what comes before damage is kept."""
    result = run("stream", folder, "-", "--ask", "1: why?", *FEW, typed=jpegs(4))
    assert result.exit_code == 0 and result.stdout.startswith("1 s: ")
    assert "4 frames up to 1.5 s" in result.stderr
    raw = bytes(range(256)) * 6  # two frames
    result = run("stream", folder, "-", "--size", "16x16", "--fps", 4, *FEW, typed=raw)
    assert result.exit_code == 0 and "2 frames up to 0.25 s" in result.stderr
    result = run("stream", folder, "-", "--live", *FEW, typed=jpegs(40, (8, 8)))
    assert result.exit_code == 0 and "1 frames up to 0 s" in result.stderr
    memory = tmp_path / "memory"
    damaged = jpegs(3)[:-100]
    result = run("stream", folder, "-", "--save", memory, *FEW, typed=damaged)
    assert result.exit_code == 2 and "error: frame 2 of standard input is damaged" in result.stderr
    assert "2 frames up to 0.5 s" in result.stderr and memory.is_file()


def test_frames_that_come_too_fast(run, folder, engine, tmp_path, monkeypatch):
    """A live source drops the oldest, and the end says how many."""

    def ahead(items, waiting, *, live, stopped):
        found = before(items, waiting, live=live, stopped=stopped)
        with found._changed:
            assert found._changed.wait_for(lambda: found._ended, 20)  # all have come
        return found

    before = command.Ahead
    monkeypatch.setattr(command, "Ahead", ahead)
    monkeypatch.setattr(command, "by_clock", command.at_rate)
    given = ("--live", "--waiting", 3, "--save", tmp_path / "memory", *FEW)
    result = run("stream", folder, "-", *given, typed=jpegs(8, (8, 8)))
    assert result.exit_code == 0 and re.search(r"\n\[3 frames .*, 5 dropped", result.stderr)
    stream = VideoStream.load(tmp_path / "memory", engine, Processor.from_pretrained(folder))
    assert (stream.frames, stream.dropped) == (3, 5)
    stream.close()


def test_mistakes(run, folder, film, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:-500])
    (tmp_path / "memory").write_bytes(b"no stream")
    for arguments, culprit in (
        ((tmp_path / "empty.mp4",), "empty file"),
        ((tmp_path / "cut.mp4",), "cut short"),
        (("rtsp://host/camera",), "web address"),
        (("/dev/null",), "camera /dev/null"),
        (("-",), "- holds no frames"),
        (("-", "--size", "16"), "--size is '16'"),
        ((film, "--size", "16x16"), "--size came with VIDEO"),
        ((film, "--live"), "--live came with VIDEO"),
        ((film, "--fps", 0), "--fps is 0"),
        ((film, "--ask", "3: "), "has no question"),
        ((film, "--save", tmp_path / "no" / "file"), "which is no folder"),
        ((film, "--load", tmp_path), "is a folder"),
        ((film, "--load", tmp_path / "none"), "does not exist"),
        ((film, "--load", tmp_path / "memory"), "truncated, or not a safetensors file"),
    ):
        result = run("stream", folder, *arguments, "--no-compilation-cache")
        assert result.exit_code == 2, (arguments, result.stderr)
        assert culprit in result.stderr.splitlines()[-2], result.stderr
        assert result.stderr.splitlines()[-1].startswith("  -> ") and result.stdout == ""
