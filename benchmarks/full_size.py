"""The published size on one GPU: prefill, decoding, an image question, peak memory.

Examples:

    # about 4 minutes on an H100
    python -m benchmarks.full_size

    # a shorter prompt
    python -m benchmarks.full_size --prompt 2048

    # a profiler trace; python -m benchmarks.trace FOLDER lists its kernels
    python -m benchmarks.full_size --profile FOLDER

The model has 4,408,381,536 random bf16 parameters: the answers have no meaning, only their speed
does. Results go to benchmarks/results/full_size.jsonl.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import add_commit, record
from benchmarks.timing import summary
from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import cache_spec
from infinitevl_jax.serve.generation import Request
from infinitevl_jax.serve.programs import STEPS
from infinitevl_jax.serve.sampling import Sampling
from infinitevl_jax.serve.slots import Slots


def timed(call, repeats: int) -> dict[str, float]:
    """Milliseconds of `call` until its arrays are ready: median, min and max after one warm-up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return summary(times, 3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs (default: 20)")
    parser.add_argument(
        "--profile", help="write a profiler trace of one prefill and 32 tokens to this folder"
    )
    parser.add_argument(
        "--attend", help='implementations of attention, in order, such as "mosaic_gpu,xla"'
    )
    parser.add_argument("--gated-delta-rule", help="implementations of the gated delta rule")
    add_commit(parser)
    args = parser.parse_args()

    config = infinitevl_4b()
    started = time.perf_counter()
    ops = resolve_ops(
        None, OpsConfig(attention=args.attend, gated_delta_rule=args.gated_delta_rule)
    )
    model = InfiniteVL.random(config, dtype=jnp.bfloat16, ops=ops)
    jax.block_until_ready(model.params)
    result = {
        "parameters": model.parameter_count,
        "initialise_s": round(time.perf_counter() - started, 1),
        "prompt": args.prompt,
    }
    print(result, flush=True)

    rng = np.random.default_rng(0)
    prompts = [build_inputs(config, rng.integers(0, 150_000, (1, args.prompt))) for _ in range(4)]
    fresh = model.init_cache(1)
    started = time.perf_counter()
    logits, cache = jax.block_until_ready(model.prefill(prompts[0], fresh))
    result["prefill_compile_s"] = round(time.perf_counter() - started, 1)
    turn = iter(range(10**6))
    result["prefill_ms"] = timed(
        lambda: model.prefill(prompts[next(turn) % 4], fresh), args.repeats
    )
    print(result, flush=True)

    # decode 32 tokens with a full window, in launches as `generate` makes them
    endless = Request(2**30, Sampling(), seed=0, ends=(), pad=0)
    slots, _ = model.programs.begin(Slots.beginning(endless, 1, None), logits, sampled=False)
    state = {"cache": cache, "slots": slots}

    def launch():
        state["cache"], state["slots"], tokens = model.programs.decode(
            model.params, state["cache"], state["slots"], steps=STEPS, sampled=False
        )
        return tokens

    started = time.perf_counter()
    jax.block_until_ready(launch())
    result["decode_compile_s"] = round(time.perf_counter() - started, 1)

    def run():
        return [launch() for _ in range(32 // STEPS)]

    run_ms = timed(run, args.repeats)
    result["decode_ms"] = {name: round(value / 32, 3) for name, value in run_ms.items()}
    print(result, flush=True)

    # an image question through the processor with its built-in tokenizer
    picture = rng.integers(0, 255, (448, 448, 3), np.uint8)
    question = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "What is in the picture?"},
            ],
        }
    ]
    batch = Processor()(question)
    started = time.perf_counter()
    answer = model.generate(**batch, max_new_tokens=16, eos_token_ids=[])
    result["image_question_first_s"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    again = model.generate(**batch, max_new_tokens=16, eos_token_ids=[])
    result["image_question_s"] = round(time.perf_counter() - started, 3)
    result["image_question_tokens"] = [int(batch["input_ids"].shape[1]), int(answer.shape[1])]
    assert (answer == again).all(), "greedy answers differ between two runs"
    stats = jax.devices()[0].memory_stats() or {}
    result["peak_GB"] = round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)
    result["cache_bytes"] = cache_spec(config, 1, None, jnp.bfloat16).nbytes
    assert cache.nbytes == result["cache_bytes"]

    if args.profile:
        with jax.profiler.trace(args.profile):
            jax.block_until_ready(model.prefill(prompts[0], fresh))
            run()
    result["ran"] = model.ops.report()
    record("full_size", args.commit, result)


if __name__ == "__main__":
    main()
