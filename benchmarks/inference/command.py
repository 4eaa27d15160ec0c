"""Inference of the published size on one GPU, beside the card's limits and a Transformer.

Examples:

    # all parts of ours
    python -m benchmarks.inference

    # some of them, at some contexts; each line is recorded as soon as it is known
    python -m benchmarks.inference --parts decode prefill --batches 1 --contexts 1024 1048576

    # a long stream; 10,000 frames
    python -m benchmarks.inference --parts stream --frames 10000

    # the Transformer: needs PyTorch and transformers
    python -m benchmarks.inference --parts transformer

    # tables and plots of all that was recorded, without measuring
    python -m benchmarks.inference --plot

    # every part of ours on a CPU, with a tiny model
    python -m benchmarks.inference --tiny --results tiny.jsonl

Parts:

* card: bytes a second of copies in device memory (read and written), and FLOP a second of large
  bf16 products. They are measured in every run; each speed stands beside the limit computed from
  them.
* decode: milliseconds a token through `Engine`, against the context with a batch of one, and
  against the batch with a full window. Contexts beyond the window: the window is read, then the
  cache's counters are set (`--read-all` reads every token). Bytes of the cache, and by the formula.
* prefill: `InfiniteVL.prefill` against the length, and the time to the first token.
* stream: `VideoStream`, from a uint8 frame on the host to the updated state, with a full window;
  percentiles and drift, and the time to the first token of an answer.
* streams: many streams in one engine, each with a full window.
* batch: tokens a second of one and of many requests of mixed lengths through `Engine`, and how long
  they wait while a long prompt is read.
* transformer: `transformers`' Qwen2.5-VL text model of equal size (benchmarks.inference.transformer
  --help), in a process of its own.

The model has random parameters: the text has no meaning, only its speed does. `compilations` counts
programs that were compiled after the warm-up. The device's peak memory is that of the process so
far: run a part by itself to have its own. Results go to benchmarks/results/inference.jsonl.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from benchmarks.inference.batch import batch
from benchmarks.inference.card import Card, measure_card
from benchmarks.inference.decode import decode
from benchmarks.inference.plot import report
from benchmarks.inference.prefill import prefill
from benchmarks.inference.sizes import SIZES, Bench, Size
from benchmarks.inference.stream import stream, streams
from benchmarks.inference.watch import Compilations, begin_memory, memory
from benchmarks.record import RESULTS, add_commit, record
from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.compilation import kept
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.processing.video import VideoOptions

PARTS: dict[str, Callable[[Bench], Iterator[dict]]] = {
    "decode": decode,
    "prefill": prefill,
    "stream": stream,
    "streams": streams,
    "batch": batch,
}
TRANSFORMER, CARD = "transformer", "card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=(CARD, *PARTS, TRANSFORMER),
        help="default: all but transformer; with --plot: none",
    )
    parser.add_argument("--size", choices=SIZES, default="4.4B", help="default: 4.4B")
    parser.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="--size tiny"
    )
    for name, what in {
        "contexts": "tokens before the decoded ones, for a batch of one",
        "batches": "sequences that are decoded together",
        "prompts": "lengths of prefill",
        "peer": "lengths of the Transformer's cache",
    }.items():
        parser.add_argument(f"--{name}", type=count, nargs="+", help=what)
    for name, what in {
        "frames": "frames of one stream",
        "streams": "streams in one engine",
        "rounds": "frames of each of them",
        "requests": "requests at once",
        "new": "tokens of each request",
        "long": "tokens of the prompt that comes between requests",
        "chunk": "tokens of a prompt that an engine reads at once",
        "steps": "decoding steps a launch",
        "repeats": "timed runs",
    }.items():
        parser.add_argument(f"--{name}", type=count, help=what)
    parser.add_argument(
        "--rows", type=count, default=32, help="streams that are read at once (default: 32)"
    )
    parser.add_argument(
        "--read-all",
        action="store_true",
        help="read contexts beyond the window token by token, instead of setting the counters",
    )
    parser.add_argument(
        "--allowed",
        help='implementations of all operators, in order, such as "xla", or of one of them, such as'
        ' "projection=mosaic_gpu,xla"',
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "inference.jsonl", help="file of the lines"
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        type=Path,
        const=RESULTS / "inference",
        help="write tables and plots of all recorded lines to this folder",
    )
    add_commit(parser)


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args()
    with kept(True):
        done = measure(args)
    if args.plot is not None:
        for path in report(args.results, args.plot):
            print(path)
    return 0 if done else 1


def measure(args: argparse.Namespace) -> bool:
    """Run the parts that were asked for. Returns whether all of them worked."""
    parts = args.parts
    if parts is None:
        parts = [] if args.plot is not None else [CARD, *PARTS]
    size, worked = chosen_size(args), True
    if TRANSFORMER in parts:  # before this process takes the device's memory
        worked = run_transformer(args, size)
    parts = [part for part in parts if part != TRANSFORMER]
    if not parts:
        return worked
    compilations = Compilations()
    with compilations.watched():
        card = measure_card(size.copied, size.product)
        case = {"part": CARD, "model": size.name, "allowed": args.allowed}
        record("inference", args.commit, case | card.figures(), args.results)
        parts = [part for part in parts if part != CARD]
        if parts:
            bench = make_bench(args, size, card, compilations)
            for part in parts:
                worked &= run_part(part, PARTS[part](bench), bench, args)
    return worked


def chosen_size(args: argparse.Namespace) -> Size:
    """The size with what the arguments change."""
    names = [field.name for field in dataclasses.fields(Size) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    size = dataclasses.replace(SIZES[args.size], **given)
    if size.requests < 2:
        raise SystemExit("--requests 1: one is measured anyway; give 2 or more")
    return size


def make_bench(args, size: Size, card: Card, compilations: Compilations) -> Bench:
    ops = None
    if args.allowed:
        names = [field.name for field in dataclasses.fields(OpsConfig)]
        one, _, order = args.allowed.rpartition("=")
        if one and one not in names:
            raise SystemExit(f"--allowed {args.allowed}: the operators are {', '.join(names)}")
        ops = resolve_ops(None, OpsConfig(**dict.fromkeys([one] if one else names, order)))
    model = InfiniteVL.random(size.config(), dtype=size.dtype, ops=ops)
    jax.block_until_ready(model.params)
    videos = VideoOptions(min_pixels=min(VideoOptions.min_pixels, size.side**2))
    processor = Processor(videos=videos)  # it leaves frames as large as they are
    return Bench(size, model, processor, card, compilations, args.read_all, args.rows)


def run_part(part: str, lines: Iterable[dict], bench: Bench, args: argparse.Namespace) -> bool:
    """Record the lines of a part. A part that fails is reported, and the next one runs."""
    case = {
        "part": part,
        "model": bench.size.name,
        "parameters": bench.model.parameter_count,
        "dtype": bench.size.dtype,
        "allowed": args.allowed,
    }
    begin_memory()
    started, before = time.perf_counter(), set(bench.model.ops.report())
    try:
        for line in lines:
            ran = bench.model.ops.report()
            more = {
                "seconds": round(time.perf_counter() - started, 1),
                "ran": [text for text in ran if text not in before],
            }
            found = case | line | bench.card.figures() | memory() | more
            record("inference", args.commit, found, args.results)
            started, before = time.perf_counter(), set(ran)
    except Exception as error:
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]
        print(f"{part} fails: {reason}", file=sys.stderr, flush=True)
        return False
    return True


def run_transformer(args: argparse.Namespace, size: Size) -> bool:
    """Measure the Transformer in a process of its own: PyTorch and JAX do not share memory."""
    command = [sys.executable, "-m", "benchmarks.inference.transformer", "--size", size.name]
    command += ["--commit", args.commit, "--results", str(args.results)]
    command += ["--lengths", *map(str, size.peer), "--repeats", str(size.repeats)]
    return subprocess.run(command, check=False).returncode == 0
