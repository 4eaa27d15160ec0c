"""Compile the training step of each stage of the 4.4 B model for TPU pods, on any CPU.

Examples:

    # stage II for v5p:4x4x4
    python -m benchmarks.pods

    # stage I-2 for other pods, with 64 rows of the global batch
    python -m benchmarks.pods --stage distill --topology v5e:16x16 --topology v6e:16x16

    # stage II with another batch and split
    python -m benchmarks.pods --topology v5e:16x16 train.data.batch=256 run.tensor=2

A stage is the shipped preset paper_STAGE, with changes as `train.py` takes them, for models of the
published sizes. Unless run.tensor is given, it is as large as it takes to give each row of the
batch its devices. No chip is involved: memory is what the compiler reports. One program takes
minutes on two cores.

FLOPs, bytes and bytes of collectives are those of one chip in one step. They are counted in the
text of the compiled program with the trips of its loops (`pallas_kernels.testing.hlo`). FLOPs are
those of matrix products, also of recomputed ones, without those inside of the kernels. Each line
also counts the collectives in the text (one inside a loop counts once) and names those whose result
has the length of a row. Results go to benchmarks/results/pods.jsonl.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from benchmarks.record import add_commit, record  # noqa: E402  the platform is chosen first
from infinitevl_jax.config.presets import Preset, load_preset  # noqa: E402
from infinitevl_jax.train.pods import collectives, compile_step, of_rows  # noqa: E402
from pallas_kernels.testing.hlo import COLLECTIVES, work  # noqa: E402
from pallas_kernels.testing.pods import HBM, pod_devices  # noqa: E402

STAGES = ("layerwise", "distill", "supervised", "long")
# Smaller tiles of the compiler halve the time that it takes, for 0.3 % of the memory of a step.
SMALL_TILES = {"xla_tpu_scoped_vmem_limit_kib": "8192"}


def stage_preset(stage: str, changes: list[str], devices: int) -> Preset:
    """The preset of a stage, whose rows have all of a pod's devices."""
    preset = load_preset(f"paper_{stage}", changes)
    if any(change.startswith("run.tensor=") for change in changes):
        return preset
    tensor = max(1, devices // preset.train.data.batch)
    return load_preset(f"paper_{stage}", [*changes, f"run.tensor={tensor}"])


def measure(stage: str, topology: str, changes: list[str], small: bool) -> dict:
    """Figures of a stage's compiled step, with `small` tiles."""
    preset = stage_preset(stage, changes, pod_devices(topology))
    data, hbm = preset.train.data, HBM[topology.split(":")[0]]
    started = time.perf_counter()
    report, ran = compile_step(topology, preset, SMALL_TILES if small else None)
    taken = round(time.perf_counter() - started, 1)
    found, done = collectives(report.hlo), work(report.hlo)
    memory = ("arguments", "outputs", "temporaries", "peak")
    kinds = {kind: sum(n for (k, _), n in found.items() if k == kind) for kind in COLLECTIVES}
    return {
        "stage": stage,
        "topology": topology,
        "rows": data.batch,
        "length": data.length,
        "patches": data.patches,
        "tensor": preset.run.tensor,
        "remat": preset.run.remat,
        "small_tiles": small,
        "compile_s": taken,
        **{f"{name}_GB": round(getattr(report, name) / 1e9, 3) for name in memory},
        "hbm_GB": hbm / 1e9,
        "fits": report.peak < hbm,
        "TFLOP": round(done.flops / 1e12, 2),
        "GB": round(done.bytes / 1e9, 1),
        "collective_GB": {k: round(size / 1e9, 3) for k, size in sorted(done.collectives.items())},
        "ran": ran,
        "collectives": {kind: count for kind, count in kinds.items() if count},
        "of_rows": of_rows(found, data.length),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=STAGES,
        help="stage of training; may be repeated (default: supervised)",
    )
    parser.add_argument(
        "--topology",
        action="append",
        help="v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, ...; may be repeated (default:"
        " v5p:4x4x4)",
    )
    parser.add_argument(
        "--small-tiles",
        action="store_true",
        help="let the compiler use smaller tiles, which halves the time that it takes",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes to the presets, such as train.data.batch=256",
    )
    add_commit(parser)
    args = parser.parse_args()
    for stage in args.stage or ["supervised"]:
        for topology in args.topology or ["v5p:4x4x4"]:
            figures = measure(stage, topology, args.changes, args.small_tiles)
            record("pods", args.commit, figures)


if __name__ == "__main__":
    main()
