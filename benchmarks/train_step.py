"""A training step of the published size on one GPU: time, memory and MFU.

Examples:

    # the default implementations
    python -m benchmarks.train_step

    # with and without the Hopper kernels, with two kinds of remat
    python -m benchmarks.train_step --attend mosaic_gpu,xla xla \\
        --gated-delta-rule mosaic_gpu,xla xla --remat full dots

    # scanned and unrolled layers, with profiler traces
    python -m benchmarks.train_step --remat dots --layers scanned unrolled --profile traces

    # stages with a teacher beside the student, and II
    python -m benchmarks.train_step --stage layerwise distill supervised

    # with an option of the compiler
    python -m benchmarks.train_step --compiler-option xla_gpu_enable_dynamic_slice_fusion=true

One row of 8,192 tokens, among them the tokens of 4,096 image patches; bf16 activations; AdamW.
`--train mixers` trains only the token mixers (994 M parameters), `--train decoder` all but the
vision tower and the embeddings (3.43 B). Trained parameters are f32 with two moments. On an H200
(141 GB) `decoder` peaked at 61.5 GB with remat=full, 43.1 of them parameters, moments and frozen
weights.

`--stage` takes objective, teacher, trained parameters and optimizer from the presets paper_STAGE,
with one row. The teacher's weights are bfloat16, and those that do not train are the student's.

Each combination of the given lists is a setting. All settings start from the same random
parameters. A setting is recorded in benchmarks/results/train_step.jsonl when it is done. If one
fails, that is reported and the next one runs. A step is timed from its batch on the device to its
end. MFU counts the FLOPs of the models (`stage_flops`) without recomputation, over 989 TFLOP/s.
"""

import argparse
import gc
import itertools
import os
import re
import time
from collections.abc import Mapping
from functools import partial

# nearly all memory; the default is three quarters
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax  # noqa: E402  its memory is set first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from benchmarks.record import add_commit, record  # noqa: E402
from benchmarks.step_timing import GRID, memory_figures, random_batch, time_steps  # noqa: E402
from benchmarks.train_flops import stage_flops, step_flops  # noqa: E402
from infinitevl_jax.config.model import ModelConfig, infinitevl_4b  # noqa: E402
from infinitevl_jax.config.presets import Preset, load_preset  # noqa: E402
from infinitevl_jax.config.run import REMATS, OpsConfig, RunConfig  # noqa: E402
from infinitevl_jax.config.train import OptimizerConfig  # noqa: E402
from infinitevl_jax.data.batch import TrainBatch  # noqa: E402
from infinitevl_jax.nn.ops import resolve_ops  # noqa: E402
from infinitevl_jax.nn.params import initialize, parameters  # noqa: E402
from infinitevl_jax.sharding import make_mesh, parameter_shardings  # noqa: E402
from infinitevl_jax.train.models import common_layout  # noqa: E402
from infinitevl_jax.train.objectives.objective import STUDENT  # noqa: E402
from infinitevl_jax.train.optimizer import make_optimizer, split_trainable  # noqa: E402
from infinitevl_jax.train.plan import plan_step  # noqa: E402
from infinitevl_jax.train.pods import published_models  # noqa: E402
from infinitevl_jax.train.step import (
    NOTHING,
    init_state,
    model_of,
    put_batch,
    state_shardings,
    supervised_loss,
    train_step,
)  # noqa: E402

TRAIN = {"mixers": [r"layers\..*self_attn\..*"], "decoder": [r"layers\..*", r"norm\.weight"]}
LAYERS = {"scanned": True, "unrolled": False}
STAGES = ("layerwise", "distill", "supervised")


def compile_step(
    config: ModelConfig,
    run: RunConfig,
    mesh: Mesh,
    optimizer,
    names: list[str],
    begin,
    batch: TrainBatch,
    options: Mapping[str, str],
):
    """Compile the training step for a mesh and create its first state.

    Args:
      names: the parameters that train.
      begin: returns all parameters, on any device.
      batch: on the host.
      options: of the compiler.

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
        step = step.lower(state, put_batch(batch, mesh)).compile(dict(options))
    line["compile_s"] = round(time.perf_counter() - started, 1)
    return step, state, line | memory_figures(step)


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
    options: Mapping[str, str] = NOTHING,
) -> dict:
    """Figures of one supervised setting: compile time, and those of `time_steps`.

    Args:
      begin: returns fresh parameters on the device, the same ones at each call.
      steps: timed steps, after `warmup` steps.
      options: of the compiler.
    """
    ops = OpsConfig(attention=attend, gated_delta_rule=gated_delta_rule)
    run = RunConfig(fsdp=1, dtype=dtype, remat=remat, scan=scan, ops=ops)
    mesh = make_mesh(run, jax.devices()[:1])
    known = parameters(config, scanned=True)
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-4, warmup=0.0), 1000, known)
    draw = partial(random_batch, config, np.random.default_rng(0), length, images, grid)
    names, _ = split_trainable(known, train)
    first = draw()
    flops = step_flops(config, [layer for name in names for layer in known[name].layers], first)
    step, state, line = compile_step(config, run, mesh, optimizer, names, begin, first, options)
    print(f"  compiled: {line}", flush=True)
    timed = time_steps(step, state, mesh, draw, flops, steps=steps, warmup=warmup, profile=profile)
    return line | timed | {"ran": resolve_ops(mesh, ops).report()}


def measure_stage(
    preset: Preset,
    configs: Mapping[str, ModelConfig],
    *,
    steps: int = 20,
    warmup: int = 3,
    images: int = 4,
    grid=GRID,
    profile: str | None = None,
    options: Mapping[str, str] = NOTHING,
) -> dict:
    """Figures of a step of a preset, with random parameters in bfloat16.

    Args:
      configs: its models by name.
      options: of the compiler.
    """
    mesh = make_mesh(preset.run, jax.devices()[:1])
    ops, length = resolve_ops(mesh, preset.run.ops), preset.train.data.length
    plan = plan_step(preset, configs, mesh, ops)
    student, rng = configs[STUDENT], np.random.default_rng(0)
    draw = partial(random_batch, student, rng, length, images, grid)
    first, layers = draw(), [layer for name in plan.trained for layer in plan.known[name].layers]
    flops = stage_flops(preset.train.objective, configs, layers, first)
    values = {"scanned": common_layout(*configs.values()), "dtype": jnp.bfloat16}
    with jax.set_mesh(mesh):
        # the device's random generator compiles faster than jax's default one
        params = initialize(student, jax.random.key(0, impl="rbg"), **values)
        begin = partial(init_state, trainable=plan.trained, optimizer=plan.optimizer)
        state = jax.jit(begin, donate_argnums=0)(params)
        del params
        held = {
            name: initialize(configs[name], jax.random.key(1, impl="rbg"), only=set(own), **values)
            for name, own in plan.held.items()
        }
        line = {
            "parameters": sum(p.size for p in plan.known.values()),
            "of_teacher": sum(p.size for own in held.values() for p in own.values()),
            "trained": sum(plan.known[name].size for name in plan.trained),
        }
        started = time.perf_counter()
        step = jax.jit(plan.step, donate_argnums=0)
        compiled = step.lower(state, put_batch(first, mesh), held).compile(dict(options))
        line["compile_s"] = round(time.perf_counter() - started, 1)
    line |= memory_figures(compiled)
    print(f"  compiled: {line}", flush=True)

    def run(state, batch):
        return compiled(state, batch, held)

    timed = time_steps(run, state, mesh, draw, flops, steps=steps, warmup=warmup, profile=profile)
    return line | timed | {"ran": ops.report()}


def starter(config: ModelConfig, dtype=jnp.bfloat16):
    """A function that returns the same random parameters at each call.

    It uses the device's random generator, which compiles faster than jax's default one.
    """
    return partial(initialize, config, jax.random.key(0, impl="rbg"), scanned=True, dtype=dtype)


def compiler_option(text: str) -> tuple[str, str]:
    """NAME=VALUE -> (NAME, VALUE)."""
    name, equals, value = text.partition("=")
    if not (name.startswith("xla_") and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: write xla_NAME=VALUE, such as xla_x=true")
    return name, value


def add_compiler_options(parser: argparse.ArgumentParser) -> None:
    """`--compiler-option`, which may be repeated."""
    parser.add_argument(
        "--compiler-option",
        type=compiler_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of XLA for the step; may be repeated",
    )


def of_stage(
    stage: str, remat: str, scan: bool, attend, gated_delta_rule, length: int, patches: int
) -> Preset:
    """The preset of a stage with one row on one device."""
    changes = ["train.data.batch=1", "train.steps=1000", f"run.remat={remat}"]
    changes += [f"run.scan={str(scan).lower()}", f"train.data.length={length}"]
    changes += [f"train.data.patches={patches}"]
    ops = {"attention": attend, "gated_delta_rule": gated_delta_rule}
    changes += [f"run.ops.{name}={value}" for name, value in ops.items() if value]
    return load_preset(f"paper_{stage}", changes)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train", nargs="+", choices=TRAIN, help="supervised, by what trains (default: both)"
    )
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=[], help="stages of training instead"
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
    add_compiler_options(parser)
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

    trains = args.train or ([] if args.stage else list(TRAIN))
    config = infinitevl_4b()
    begin = starter(config)
    implementations = list(zip(args.attend, args.gated_delta_rule, strict=True))
    work = [("stage", stage) for stage in args.stage] + [("train", train) for train in trains]
    for (key, name), remat, layers, (attend, gated_delta_rule) in itertools.product(
        work, args.remat, args.layers, implementations
    ):
        how = {
            "remat": remat,
            "layers": layers,
            "attend": attend,
            "gated_delta_rule": gated_delta_rule,
        }
        size = {"length": args.length, "patches": args.patches}
        setting = {key: name, **how, **size, "dtype": "bfloat16"}
        if args.compiler_option:
            setting["compiler_options"] = dict(args.compiler_option)
        print(f"\n{setting}", flush=True)
        how["scan"] = LAYERS[how.pop("layers")]
        timing = {"steps": args.steps, "images": images, "profile": args.profile}
        timing["options"] = dict(args.compiler_option)
        try:
            if key == "stage":
                preset = of_stage(name, **how, **size)
                figures = measure_stage(preset, published_models(preset), **timing)
            else:
                figures = measure(config, begin, TRAIN[name], length=args.length, **how, **timing)
        except Exception as error:  # report it and measure the other settings
            figures = {"failed": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]}
        record("train_step", args.commit, setting | figures)
        gc.collect()  # free the state of this setting before the next one


if __name__ == "__main__":
    main()
