"""Video streams: the time from a uint8 frame on the host to the updated state."""

import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.inference.card import decode_bytes, read_flops
from benchmarks.inference.sizes import Bench
from benchmarks.inference.watch import memory
from benchmarks.timing import summary
from infinitevl_jax.inputs.frame import frame_inputs
from infinitevl_jax.inputs.model_inputs import ModelInputs
from infinitevl_jax.processing.images import resize_image
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.video_stream import VideoStream

FPS = 2.0  # of the timestamps
POOL = 16  # pictures that come in turn
ANSWERS = 5
POINTS = 100  # of the curve over all frames

_nothing = jax.jit(lambda x: x + 1)


def wait_for_device() -> None:
    """Wait for what was launched before: a GPU runs programs in the order of their launch."""
    jax.block_until_ready(_nothing(jnp.zeros((), jnp.int32)))


def stream(bench: Bench) -> Iterator[dict]:
    """One line: frames one after another, each waited for, with the window full."""
    size, tokens = bench.size, frame_tokens(bench)
    # a slot for the stream, one for its questions
    engine = bench.engine(2, chunk=tokens)
    watched, frames = engine.open_stream(bench.processor), pictures(size.side)
    fill(bench, [watched], frames)
    for _ in range(2):
        answer(watched)
    wait_for_device()
    bench.compilations.warm()
    before, chunks, host, times = memory(), engine.chunks, [], []
    started = time.perf_counter()
    for i in range(size.frames):
        begin = time.perf_counter()
        watched.push(frames[i % POOL], seconds_of(watched))
        host.append((time.perf_counter() - begin) * 1e3)
        wait_for_device()
        times.append((time.perf_counter() - begin) * 1e3)
    elapsed = time.perf_counter() - started
    after = memory()
    assert engine.chunks - chunks == size.frames, "a frame took more than one chunk"

    free = min(size.frames, 100)
    begin = time.perf_counter()
    for i in range(free):
        watched.push(frames[i % POOL], seconds_of(watched))
    wait_for_device()
    overlapped = free / (time.perf_counter() - begin)

    answers = []
    for _ in range(ANSWERS):
        begin = time.perf_counter()
        answer(watched)
        answers.append((time.perf_counter() - begin) * 1e3)
    assert watched.dropped == 0
    watched.close()
    inputs = example(bench)
    window = bench.model.config.text.sliding_window
    yield {
        "streams": 1,
        "frames": size.frames,
        "pixels": [size.side, size.side],
        "tokens_per_frame": tokens,
        "ms": summary(times, 3) | percentiles(times),
        "host_ms": summary(host, 3),
        "frames_per_s": round(size.frames / elapsed, 2),
        # frames pushed without waiting for the device
        "frames_per_s_overlapped": round(overlapped, 2),
        **drift(times),
        "curve_ms": curve(times),
        "answer_first_token_ms": summary(answers, 3),
        "memory_before": before,
        "memory_after": after,
        **bench.card.beside(
            statistics.median(times),
            sum(decode_bytes(bench.model.config, 1, window, bench.model.dtype).values()),
            read_flops(bench.model.config, inputs, window),
        ),
        **bench.compilations.since(),
    }


def streams(bench: Bench) -> Iterator[dict]:
    """One line: rounds in which each of many streams in one engine gets a frame."""
    size, tokens, count = bench.size, frame_tokens(bench), bench.size.streams
    rows = min(bench.rows, count)
    engine = bench.engine(count, chunk=tokens, rows=rows)
    watched = [engine.open_stream(bench.processor) for _ in range(count)]
    frames = pictures(size.side)
    fill(bench, watched, frames)
    wait_for_device()
    bench.compilations.warm()
    times = []
    for turn in range(size.rounds):
        begin = time.perf_counter()
        show(engine, watched, frames, turn)
        wait_for_device()
        times.append((time.perf_counter() - begin) * 1e3)
    compilations = bench.compilations.since()
    assert not any(one.dropped for one in watched)
    for one in watched:
        one.close()
    config, window = bench.model.config, bench.model.config.text.sliding_window
    # weights are read once for each group of `rows` frames
    moved = decode_bytes(config, count, window, bench.model.dtype)
    nbytes = moved["weights"] * -(-count // rows) + moved["cache"]
    yield {
        "streams": count,
        "frames": size.rounds,
        "rows": rows,
        "pixels": [size.side, size.side],
        "tokens_per_frame": tokens,
        "ms": summary(times, 3),
        "frames_per_s": round(count * size.rounds / sum(times) * 1e3, 2),
        **bench.card.beside(
            statistics.median(times), nbytes, count * read_flops(config, example(bench), window)
        ),
        **compilations,
    }


def pictures(side: int) -> list[np.ndarray]:
    """Random frames [side, side, 3] uint8."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(POOL)]


def example(bench: Bench) -> ModelInputs:
    """The inputs of one frame."""
    options = bench.processor.videos
    frame = resize_image(Image.fromarray(pictures(bench.size.side)[0]), options)
    assert frame.shape[:2] == (bench.size.side,) * 2, "the processor changes the size of a frame"
    return frame_inputs(
        bench.model.config,
        frame,
        *options.normalisation,
        token=bench.model.config.video_token_id,
        base=0,
        time=0,
    )


def frame_tokens(bench: Bench) -> int:
    """Tokens of a frame: one chunk of the engine."""
    return example(bench).decoder.tokens.shape[1]


def seconds_of(watched: VideoStream) -> float:
    """The time of the next frame."""
    return watched.frames / FPS


def show(engine: Engine, streams: list[VideoStream], frames: list[np.ndarray], turn: int) -> None:
    """Push a frame to each stream, and let the engine read them together."""
    for i, watched in enumerate(streams):
        watched.push(frames[(turn + i) % POOL], seconds_of(watched), wait=False)
    engine.run()


def fill(bench: Bench, streams: list[VideoStream], frames: list[np.ndarray]) -> None:
    """Push frames until the windows are full, and two more."""
    window, tokens = bench.model.config.text.sliding_window, frame_tokens(bench)
    for turn in range(-(-window // tokens) + 2):
        show(streams[0].engine, streams, frames, turn)


def answer(watched: VideoStream) -> str:
    """The first token of an answer about the stream so far."""
    return "".join(watched.ask("What is happening?", max_new_tokens=1, eos_token_ids=[]))


def percentiles(times: list[float]) -> dict[str, float]:
    """The 95th and 99th percentile."""
    return {f"p{share}": round(float(np.percentile(times, share)), 3) for share in (95, 99)}


def drift(times: list[float]) -> dict[str, float]:
    """Medians of the first and of the last tenth of the frames, and how far the last is off."""
    tenth = max(1, len(times) // 10)
    first, last = statistics.median(times[:tenth]), statistics.median(times[-tenth:])
    return {
        "first_tenth_ms": round(first, 3),
        "last_tenth_ms": round(last, 3),
        "drift": round(last / first - 1, 4),
    }


def curve(times: list[float]) -> list[float]:
    """Medians of up to `POINTS` parts of equal length."""
    parts = np.array_split(np.asarray(times), min(POINTS, len(times)))
    return [round(float(np.median(part)), 3) for part in parts]
