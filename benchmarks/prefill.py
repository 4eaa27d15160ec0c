"""Prefill of the published size on one GPU, with and without kernels.

Examples:

    # 8K and 32K tokens, XLA only and with the Hopper kernels
    python -m benchmarks.prefill

    # one length, XLA only
    python -m benchmarks.prefill --lengths 8192 --allowed xla

The model has 4,408,381,536 random bf16 parameters; the prompt is text. Each line also has the error
of the logits of the last token (relative RMS) against float32 computed by XLA with the same
parameters. Random parameters do not damp rounding, so compare the implementations with each other.
Results go to benchmarks/results/prefill.jsonl.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from benchmarks.full_size import timed
from benchmarks.record import add_commit, record
from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.ops import resolve_ops
from pallas_kernels.testing.parity import rel_rms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens of the prompt"
    )
    parser.add_argument(
        "--allowed",
        nargs="+",
        default=["xla", "mosaic_gpu,xla"],
        help="implementations of attention and the gated delta rule, in order; several settings",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed runs (default: 20)")
    add_commit(parser)
    args = parser.parse_args()

    config, rng = infinitevl_4b(), np.random.default_rng(0)
    prompts = {
        n: [build_inputs(config, rng.integers(0, 150_000, (1, n))) for _ in range(4)]
        for n in args.lengths
    }
    params = InfiniteVL.random(config, dtype=jnp.bfloat16).params
    exact = InfiniteVL(
        config,
        params,
        dtype=jnp.float32,
        ops=resolve_ops(None, OpsConfig(attention="xla", gated_delta_rule="xla")),
    )
    right = {
        n: np.asarray(exact.prefill(prompts[n][0], exact.init_cache(1))[0], np.float64)
        for n in args.lengths
    }
    for allowed in args.allowed:
        ops = resolve_ops(None, OpsConfig(attention=allowed, gated_delta_rule=allowed))
        model = InfiniteVL(config, params, dtype=jnp.bfloat16, ops=ops)
        fresh, before = model.init_cache(1), set(ops.report())
        for length in args.lengths:
            started, turn = time.perf_counter(), iter(range(10**6))
            logits = np.asarray(model.prefill(prompts[length][0], fresh)[0], np.float64)
            compile_s = round(time.perf_counter() - started, 1)
            ms = timed(
                lambda model=model, fresh=fresh, turn=turn, n=length: model.prefill(
                    prompts[n][next(turn) % 4], fresh
                ),
                args.repeats,
            )
            line = {
                "parameters": model.parameter_count,
                "allowed": allowed,
                "prompt": length,
                "compile_s": compile_s,
                "ms": ms,
            }
            line["error"] = round(float(rel_rms(logits, right[length])), 5)
            record(
                "prefill",
                args.commit,
                line | {"ran": [text for text in ops.report() if text not in before]},
            )


if __name__ == "__main__":
    main()
