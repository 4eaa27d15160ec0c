"""A supervised training step of the published size on one GPU: time, memory and MFU.

Examples:

    # the default implementations
    python -m benchmarks.train_step

    # with and without the Hopper kernels, with two kinds of remat
    python -m benchmarks.train_step --attend mosaic_gpu,xla xla \\
        --gated-delta-rule mosaic_gpu,xla xla --remat full dots

    # scanned and unrolled layers, with profiler traces
    python -m benchmarks.train_step --remat dots --layers scanned unrolled --profile traces

One row of 8,192 tokens, among them the tokens of 4,096 image patches; bf16 activations; AdamW.
`--train mixers` trains only the token mixers (994 M parameters), `--train decoder` all but the
vision tower and the embeddings (3.43 B). Trained parameters are f32 with two moments. On an H200
(141 GB) `decoder` peaked at 61.5 GB with remat=full, 43.1 of them parameters, moments and frozen
weights.

Each combination of the given lists is a setting. All settings start from the same random
parameters. A setting is recorded in benchmarks/results/train_step.jsonl when it is done. If one
fails, that is reported and the next one runs. A step is timed from its batch on the device to its
end. MFU counts the FLOPs of the model (`step_flops`) without recomputation, over 989 TFLOP/s.
"""

import argparse
import gc
import itertools
import os
import re
import time
from functools import partial

# nearly all memory; the default is three quarters
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax  # noqa: E402  its memory is set first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from benchmarks.record import add_commit, record  # noqa: E402
from benchmarks.timing import summary  # noqa: E402
from benchmarks.trace import kernels, table  # noqa: E402
from benchmarks.train_flops import step_flops  # noqa: E402
from infinitevl_jax.config.model import ModelConfig, infinitevl_4b  # noqa: E402
from infinitevl_jax.config.run import REMATS, OpsConfig, RunConfig  # noqa: E402
from infinitevl_jax.config.train import OptimizerConfig  # noqa: E402
from infinitevl_jax.data.batch import TrainBatch  # noqa: E402
from infinitevl_jax.inputs.model_inputs import build_inputs  # noqa: E402
from infinitevl_jax.nn.ops import resolve_ops  # noqa: E402
from infinitevl_jax.nn.params import Params, initialize, parameters  # noqa: E402
from infinitevl_jax.sharding import make_mesh, parameter_shardings  # noqa: E402
from infinitevl_jax.train.optimizer import make_optimizer, split_trainable  # noqa: E402
from infinitevl_jax.train.step import (
    init_state,
    model_of,
    put_batch,
    state_shardings,
    supervised_loss,
    train_step,
)  # noqa: E402

TRAIN = {"mixers": [r"layers\..*self_attn\..*"], "decoder": [r"layers\..*", r"norm\.weight"]}
LAYERS = {"scanned": True, "unrolled": False}
PEAK = {"H100": 989e12, "H200": 989e12}  # bf16 FLOP/s without sparsity
GRID = (1, 32, 32)  # patches of an image: 448 x 448 pixels
# texts are drawn from so few tokens that they can be learnt, and the loss falls
WORDS = 1000


def random_batch(
    config: ModelConfig, rng: np.random.Generator, length: int, images: int, grid=GRID
) -> TrainBatch:
    """One full row: images, then random text as the answer."""
    pads = grid[0] * grid[1] * grid[2] // config.vision.merge_unit if images else 0
    words = min(WORDS, config.image_token_id, config.vision_start_token_id)
    image = [
        config.vision_start_token_id,
        *[config.image_token_id] * pads,
        config.vision_end_token_id,
    ]
    head = np.array(image * images, np.int32)
    row = np.concatenate([head, rng.integers(1, words, length + 1 - len(head), np.int32)])
    vision = {}
    if images:
        pixels = rng.standard_normal(
            (images * int(np.prod(grid)), config.vision.patch_features), np.float32
        )
        vision = {"pixel_values": pixels, "image_grid_thw": np.array([grid] * images)}
    inputs = build_inputs(config, row[None, :-1], **vision, patches_by_row=True)
    weights = (np.arange(1, length + 1) >= len(head)).astype(np.float32)
    return TrainBatch(inputs.patches, None, inputs.decoder, None, row[None, 1:], weights[None])


def compile_step(
    config: ModelConfig,
    run: RunConfig,
    mesh: Mesh,
    optimizer,
    names: list[str],
    begin,
    batch: TrainBatch,
):
    """Compile the training step for a mesh and create its first state.

    Args:
      names: the parameters that train.
      begin: returns all parameters, on any device.
      batch: on the host.

    Returns (step, state, figures). The figures are numbers of parameters, seconds to compile and,
    as the compiler reports, GB per device.
    """
    params = begin()
    line = {
        "parameters": sum(p.size for p in params.values()),
        "trained": sum(params[n].size for n in names),
    }
    first = partial(init_state, trainable=names, optimizer=optimizer)
    known = parameters(config, scanned=True)
    places = state_shardings(jax.eval_shape(first, params), known, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(known, mesh))
        state = jax.jit(first, out_shardings=places, donate_argnums=0)(params)
        del params
        started = time.perf_counter()
        model = model_of(config, run, resolve_ops(mesh, run.ops))
        step = jax.jit(
            partial(train_step, supervised_loss(model), optimizer),
            donate_argnums=0,
            out_shardings=(places, None),
        )
        step = step.lower(state, put_batch(batch, mesh)).compile()
    line["compile_s"] = round(time.perf_counter() - started, 1)
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (
        step,
        state,
        line
        | {
            "state_GB": round(held / 1e9, 2),
            "temporaries_GB": round(memory.temp_size_in_bytes / 1e9, 2),
        },
    )


def mfu(flops: float, milliseconds: float, devices: int) -> float | None:
    """Model FLOPs utilisation of a step; None if `PEAK` lacks this kind of device."""
    kind = jax.devices()[0].device_kind
    peak = next((rate for name, rate in PEAK.items() if name in kind), None)
    return peak and round(flops / (milliseconds * 1e-3) / peak / devices, 4)


def measure(
    config: ModelConfig,
    begin,
    train: list[str],
    *,
    attend: str | None = None,
    gated_delta_rule: str | None = None,
    remat: str = "full",
    scan: bool = True,
    steps: int = 20,
    warmup: int = 3,
    length: int = 8192,
    images: int = 4,
    grid=GRID,
    dtype: str = "bfloat16",
    profile: str | None = None,
) -> dict:
    """Figures of one setting: compile time, step time, memory, losses, FLOPs and MFU.

    Args:
      begin: returns fresh parameters on the device, the same ones at each call.
      steps: timed steps, after `warmup` steps.
    """
    ops = OpsConfig(attention=attend, gated_delta_rule=gated_delta_rule)
    run = RunConfig(fsdp=1, dtype=dtype, remat=remat, scan=scan, ops=ops)
    mesh = make_mesh(run, jax.devices()[:1])
    known = parameters(config, scanned=True)
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-4, warmup=0.0), 1000, known)
    rng = np.random.default_rng(0)
    names, _ = split_trainable(known, train)
    first = random_batch(config, rng, length, images, grid)
    flops = step_flops(config, names, first)
    step, state, line = compile_step(config, run, mesh, optimizer, names, begin, first)
    with jax.set_mesh(mesh):
        print(f"  compiled: {line}", flush=True)

        times, losses = [], []

        def one(state):
            batch = jax.block_until_ready(
                put_batch(random_batch(config, rng, length, images, grid), mesh)
            )
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            times.append((time.perf_counter() - started) * 1e3)
            losses.append(float(metrics.loss))
            return state

        for _ in range(warmup + steps):
            state = one(state)
        timed = times[warmup:]
        line["step_ms"] = summary(timed, 2) | {"steps": steps}
        median = line["step_ms"]["median"]
        line["tokens_per_s"] = round(length / median * 1e3, 1)
        line["TFLOP"] = {term: round(count / 1e12, 3) for term, count in flops.items()} | {
            "all": round(sum(flops.values()) / 1e12, 2)
        }
        line["mfu"] = mfu(sum(flops.values()), median, 1)
        stats = jax.devices()[0].memory_stats() or {}
        line["peak_GB_so_far"] = round(
            stats.get("peak_bytes_in_use", 0) / 1e9, 2
        )  # of the process: it cannot be reset
        line["loss"] = [
            round(loss, 4) for loss in (losses[0], losses[len(losses) // 2], losses[-1])
        ]
        line["loss_finite"], line["loss_fell"] = (
            bool(np.isfinite(losses).all()),
            losses[-1] < losses[0],
        )
        line["ran"] = resolve_ops(mesh, ops).report()
        if profile:
            with jax.profiler.trace(profile):
                for _ in range(2):
                    state = one(state)
            print(table(kernels(profile)), flush=True)
    return line


def starter(config: ModelConfig, dtype=jnp.bfloat16):
    """A function that returns the same random parameters at each call; compiled once.

    It uses the device's random generator, which compiles faster than jax's default one.
    """
    create = jax.jit(partial(initialize, config, scanned=True, dtype=dtype))
    key = jax.random.key(0, impl="rbg")

    def begin() -> Params:
        return jax.block_until_ready(create(key))

    return begin


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train", nargs="+", choices=TRAIN, default=list(TRAIN), help="default: both"
    )
    parser.add_argument(
        "--attend",
        nargs="+",
        default=[None],
        help='implementations of attention, in order, such as "mosaic_gpu,xla"; several settings',
    )
    parser.add_argument(
        "--gated-delta-rule",
        nargs="+",
        default=[None],
        help="implementations of the gated delta rule, one setting for each of --attend",
    )
    parser.add_argument(
        "--remat", nargs="+", choices=REMATS, default=["full"], help="default: full"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=LAYERS,
        default=["scanned"],
        help="scan identical layers, or unroll them (default: scanned)",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row")
    parser.add_argument(
        "--patches",
        type=int,
        default=4096,
        help="image patches in the row: a multiple of 1024; 0: text only",
    )
    parser.add_argument(
        "--profile",
        help="write a profiler trace of two steps of each setting to this folder, and print it",
    )
    add_commit(parser)
    args = parser.parse_args()
    if len(args.attend) != len(args.gated_delta_rule):
        parser.error(
            f"{len(args.attend)} values for --attend, {len(args.gated_delta_rule)} for"
            " --gated-delta-rule: give the same number"
        )
    images, over = divmod(args.patches, int(np.prod(GRID)))
    if over:
        parser.error(f"--patches {args.patches}: give a multiple of {np.prod(GRID)}, an image")

    config = infinitevl_4b()
    begin = starter(config)
    started = time.perf_counter()
    begin()
    print(f"random parameters: {time.perf_counter() - started:.1f} s", flush=True)
    implementations = list(zip(args.attend, args.gated_delta_rule, strict=True))
    for train, remat, layers, (attend, gated_delta_rule) in itertools.product(
        args.train, args.remat, args.layers, implementations
    ):
        setting = {
            "train": train,
            "remat": remat,
            "layers": layers,
            "attend": attend,
            "gated_delta_rule": gated_delta_rule,
        }
        setting |= {"length": args.length, "patches": args.patches, "dtype": "bfloat16"}
        print(f"\n{setting}", flush=True)
        how = {
            "attend": attend,
            "gated_delta_rule": gated_delta_rule,
            "remat": remat,
            "scan": LAYERS[layers],
            "profile": args.profile,
        }
        try:
            figures = measure(
                config,
                begin,
                TRAIN[train],
                steps=args.steps,
                length=args.length,
                images=images,
                **how,
            )
        except Exception as error:  # report it and measure the other settings
            figures = {"failed": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]}
        record("train_step", args.commit, setting | figures)
        gc.collect()  # free the state of this setting before the next one


if __name__ == "__main__":
    main()
