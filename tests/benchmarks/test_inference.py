"""The benchmark of inference: all parts at a tiny size, its limits against sums done by hand."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inference import command, sizes, stream, transformer
from benchmarks.inference.card import Card, decode_bytes, read_flops
from benchmarks.inference.decode import context_cache
from benchmarks.inference.plot import beside_ours, report
from benchmarks.inference.watch import Compilations, memory
from benchmarks.record import RESULTS
from infinitevl_jax import Processor
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.inputs.frame import frame_inputs
from infinitevl_jax.inputs.model_inputs import build_inputs


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*words, "--commit", "a"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The lines of all parts of ours, by part, and their file."""
    path = tmp_path_factory.mktemp("inference") / "inference.jsonl"
    words = "--tiny --contexts 8 1024 --batches 1 --prompts 16 --frames 12 --repeats 3 --results"
    assert command.measure(arguments(*words.split(), str(path)))
    lines = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    return {part: [line for line in lines if line["part"] == part] for part in _parts(lines)}, path


def _parts(lines):
    return dict.fromkeys(line["part"] for line in lines)


def test_every_part_leaves_its_lines(measured):
    lines, _ = measured
    assert {part: len(found) for part, found in lines.items()} == {
        "card": 1,
        "decode": 2,
        "prefill": 1,
        "stream": 1,
        "streams": 1,
        "batch": 3,
    }
    for part, found in lines.items():
        for line in found:
            assert line["model"] == "tiny" and line["commit"] == "a" and line["copy_GB_s"] > 0
            if part != "card":
                assert line["compilations"] == 0 and line["host_peak_GB"] > 0
                assert all(": xla" in ran for ran in line["ran"])
    assert lines["decode"][0]["ran"] and lines["stream"][0]["ran"]
    for line in [*lines["decode"], *lines["prefill"], *lines["stream"], *lines["streams"]]:
        assert line["ms"]["min"] <= line["ms"]["median"] <= line["ms"]["max"]
        assert line["times_limit"] == pytest.approx(
            line["ms"]["median"] / line["limit_ms"], rel=2e-3
        )


def test_decoding_says_how_long_the_context_is(measured):
    short, long = measured[0]["decode"]
    assert [(short["context"], short["context_by"])] == [(8, "reading")]
    assert [(long["context"], long["context_by"])] == [(1024, "counters")]
    for line in (short, long):
        assert line["cache_bytes"] == line["cache_bytes_by_formula"] == short["cache_bytes"]


def test_streams_are_whole(measured):
    (one,), (many,) = measured[0]["stream"], measured[0]["streams"]
    assert (one["streams"], one["frames"], one["tokens_per_frame"]) == (1, 12, 4)
    assert len(one["curve_ms"]) == 12
    assert one["drift"] == pytest.approx(one["last_tenth_ms"] / one["first_tenth_ms"] - 1, abs=1e-3)
    assert (many["streams"], many["frames"], many["rows"]) == (2, 2, 2)


def test_requests_are_all_answered(measured):
    one, many, wait = measured[0]["batch"]
    assert (one["requests"], one["finished"]) == (1, 3)
    assert (many["requests"], many["finished"]) == (2, 2)
    assert many["times_one"] == pytest.approx(many["tokens_per_s"] / one["tokens_per_s"], abs=0.01)
    # 64 tokens in chunks of 4, and a round in which the token comes
    assert (wait["requests"], wait["prompt"], wait["chunks"], wait["rounds"]) == (1, 64, 16, 17)
    assert wait["longest_wait_ms"] == wait["round_ms"]["max"]


def test_counters_are_those_of_a_sequence_that_was_read():
    """A cache whose counters were set has the counters, and the ring's order, of one that was
    read."""
    args = arguments("--tiny")
    bench = command.make_bench(args, sizes.TINY, Card(1e9, 1e9), Compilations())
    engine, window = bench.engine(1), bench.model.config.text.sliding_window
    rng = np.random.default_rng(0)
    context = 2 * window + 5
    read = context_cache(engine, context, window, rng, True)
    counted = context_cache(engine, context + 4 * window, window, rng, False)
    assert int(read.length[0]) == int(read.next_position[0]) == context
    assert int(counted.length[0]) == int(counted.next_position[0]) == context + 4 * window
    assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, counted)
    # the same slot is the oldest in both
    assert context % window == int(counted.length[0]) % window == 5
    assert all(np.abs(np.asarray(leaf)).min(-1).all() for leaf in counted.layers[0])


def test_bytes_and_flops_of_the_published_size():
    config = infinitevl_4b()
    moved = decode_bytes(config, 1, 8192, jnp.bfloat16)
    # 27 states of 16 heads, 128 x 256, f32, and 3 inputs of the convolutions, read and written
    states = 27 * 2 * (16 * 128 * 256 * 4 + 3 * (2 * 2048 + 4096) * 2)
    window = 9 * 2 * 8192 * 2 * 128 * 2
    assert moved["cache"] == states + window
    assert moved["weights"] + moved["cache"] == pytest.approx(7.67e9, rel=2e-3)
    assert decode_bytes(config, 8, 1024, jnp.bfloat16) == {
        "weights": moved["weights"],
        "cache": 8 * (states + window // 8),
    }
    million = decode_bytes(config, 1, 1 << 20, jnp.bfloat16)
    assert million == moved

    prompt = build_inputs(config, np.ones((1, 64), np.int32))
    text = config.text
    softmax = 2048 * (2048 + 2 * 256) + 2048 * 2048
    delta = 2048 * (2 * 2048 + 2 * 4096 + 2 * 16) + 4096 * 2048
    matrices = 9 * softmax + 27 * delta + 36 * 3 * 2048 * 11008
    assert read_flops(config, prompt) == (
        2 * 64 * matrices
        + 4 * 2048 * 9 * (64 * 65 / 2)
        + 27 * 6 * 128 * 256 * 16 * 64
        + 2 * text.vocab_size * 2048
    )
    # each of 64 tokens sees a whole window
    full = read_flops(config, prompt, past=8192) - read_flops(config, prompt)
    assert full == 4 * 2048 * 9 * (64 * 8192 - 64 * 65 / 2)
    options = Processor().videos
    frame = frame_inputs(
        config,
        np.zeros((448, 448, 3), np.uint8),
        *options.normalisation,
        token=config.video_token_id,
        base=0,
        time=0,
    )
    assert read_flops(config, frame, 8192) == pytest.approx(3.29e12, rel=0.02)


def test_beside_the_slower_limit():
    card = Card(copy=1e12, products=1e14)
    assert card.beside(4.0, 2e9) == {"limit_ms": 2.0, "times_limit": 2.0, "limit_GB": 2.0}
    assert card.beside(15.0, 2e9, 1e12)["limit_ms"] == 10.0


def test_figures_of_a_stream():
    times = [*[2.0] * 10, *[1.0] * 80, *[3.0] * 10]
    assert stream.drift(times) == {"first_tenth_ms": 2.0, "last_tenth_ms": 3.0, "drift": 0.5}
    assert stream.curve(times * 10) == [
        *([2.0] + [1.0] * 8 + [3.0]) * 10,
    ]
    assert stream.percentiles([1.0] * 99 + [5.0]) == {"p95": 1.0, "p99": 1.04}


def test_compilations_are_counted():
    counter = Compilations()
    with counter.watched():
        jax.jit(lambda x: x * 3 + 41)(jnp.ones(7))
        counter.warm()
        assert counter.since() == {"compilations": 0}
        jax.jit(lambda x: x * 5 + 43)(jnp.ones(11)).block_until_ready()
    assert counter.since()["compilations"] >= 1
    assert 0 < memory()["host_GB"] <= memory()["host_peak_GB"]


def test_tables_and_plots(measured, tmp_path):
    lines, path = measured
    peer = {
        "part": "transformer",
        "model": "tiny",
        "form": "cuda graph",
        "context": 900,
        "ms": {"median": 1e3, "min": 1e3, "max": 1e3},
        "limit_ms": 1.0,
        "times_limit": 1e3,
        "cache_bytes": 4096,
        "attention": "flash",
        "device": lines["card"][0]["device"],
    }
    more = tmp_path / "lines.jsonl"
    more.write_text(path.read_text("utf-8") + json.dumps(peer) + "\n", "utf-8")
    written = report(more, tmp_path / "plots")
    assert [path.suffix for path in written] == [".png"] * 3 + [".md"]
    page = written[-1].read_text("utf-8")
    ours = lines["decode"][1]["ms"]["median"]
    assert f"| {ours:,} | 1,024 | {round(1e3 / ours, 2):,} | flash |" in page
    assert page.count("## ") == 8 and "first token of an answer" in page
    assert beside_ours([peer], []) == [peer]
    with pytest.raises(SystemExit, match="holds no lines"):
        report(tmp_path / "none.jsonl", tmp_path)


def test_a_part_that_fails_is_reported(measured, monkeypatch, tmp_path, capsys):
    def fails(bench):
        yield {"batch": 1}
        raise RuntimeError("no\n  memory")

    monkeypatch.setitem(command.PARTS, "decode", fails)
    path = tmp_path / "lines.jsonl"
    assert not command.measure(arguments("--tiny", "--parts", "decode", "--results", str(path)))
    assert len(path.read_text("utf-8").splitlines()) == 2  # the card, and the line before
    assert "decode fails: RuntimeError: no memory" in capsys.readouterr().err


def test_the_arguments_change_the_size():
    changed = command.chosen_size(arguments("--contexts", "7", "--frames", "9", "--chunk", "3"))
    assert (changed.contexts, changed.frames, changed.chunk) == ([7], 9, 3)
    assert changed.prompts == sizes.PUBLISHED.prompts and changed.name == "4.4B"
    assert command.chosen_size(arguments("--tiny")) == sizes.TINY
    assert arguments("--plot").plot == RESULTS / "inference"
    allowed = arguments("--allowed", "projektion=mosaic_gpu,xla")
    with pytest.raises(SystemExit, match="projektion=mosaic_gpu,xla: the operators are "):
        command.make_bench(allowed, sizes.TINY, None, None)
    with pytest.raises(SystemExit, match="give 2 or more"):
        command.chosen_size(arguments("--requests", "1"))
    with pytest.raises(SystemExit):
        arguments("--frames", "0")


def test_the_transformer_runs_by_itself(monkeypatch, tmp_path):
    """PyTorch is asked for by its part alone, in another process."""
    words = "--tiny", "--parts", "transformer", "--peer", "5", "--results", str(tmp_path / "x")
    args, ran = arguments(*words), []

    def run(words, check):
        ran.append(words)
        return argparse.Namespace(returncode=len(ran) - 1)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.measure(args) and not command.measure(args)
    assert ran[0][1:3] == ["-m", "benchmarks.inference.transformer"]
    assert ran[0][ran[0].index("--lengths") + 1] == "5"


def test_the_transformer_attends_to_its_whole_cache():
    """Both forms of the cache give the logits of transformers' own attention."""
    import torch
    from transformers import DynamicCache

    assert transformer.register_attention("flash", "cpu") == (
        "torch scaled_dot_product_attention, CPU"
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        model = transformer.make_model(sizes.TINY, "cpu").float()
        keys, values = transformer.random_cache(model, 6)
        assert transformer.cache_size(model, 6) == sum(x.nbytes for x in keys + values)
        token, position = torch.tensor([[7]]), torch.full((3, 1, 1), 5)

        def grown(first=0):
            cache = DynamicCache(config=model.config)
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                cache.update(key[:, :, first:5].clone(), value[:, :, first:5].clone(), layer)
            return cache

        eager = transformer.logits(model, token, position, grown())
        fixed = transformer.FixedCache([x.clone() for x in keys], [x.clone() for x in values])
        assert torch.equal(transformer.logits(model, token, position, fixed), eager)
        model.set_attn_implementation("eager")
        right = transformer.logits(model, token, position, grown())
        wrong = transformer.logits(model, token, position, grown(first=1))
    assert (eager - right).abs().max() <= 1e-5 * right.abs().max()
    assert (wrong - right).abs().max() > 1e-3 * right.abs().max()


def test_lines_of_the_transformer(tmp_path):
    path = tmp_path / "lines.jsonl"
    args = argparse.Namespace(
        size="tiny", lengths=[8], backend="flash", repeats=2, results=path, commit="a"
    )
    assert transformer.measure(args) == 0
    (line,) = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    assert (line["part"], line["form"], line["context"]) == ("transformer", "eager", 8)
    assert line["cache_bytes"] == 2 * 2 * 2 * 16 * 8 * 2 and line["ms"]["min"] > 0
    assert line["limit_ms"] * line["times_limit"] == pytest.approx(line["ms"]["median"], rel=1e-2)
