"""Compile the training step of the 4.4 B model (8K tokens per row) for TPU pods, on any CPU.

Examples:

    # v5p:4x4x4 and v6e:8x8, global batch 64
    python -m benchmarks.pods

    # another pod, with tensor parallelism
    python -m benchmarks.pods --topology v5e:16x16 --rows 128 --length 32768 --tensor 2

Everything but the vision tower and the embeddings trains, in f32 with Adam's moments. Activations
are bf16; every layer is recomputed in the backward pass. This takes several minutes per topology on
two cores. No chip is involved: memory is what the compiler reports.

Each line also counts the collectives in the text of the program (one inside a loop counts once) and
names those whose result has the length of a row. Results go to benchmarks/results/pods.jsonl.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from benchmarks.record import add_commit, record  # noqa: E402  the platform is chosen first
from infinitevl_jax.train.pods import COLLECTIVES, collectives, compile_step, of_rows  # noqa: E402
from pallas_kernels.testing.pods import HBM  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology",
        action="append",
        help="v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, ...; may be repeated",
    )
    parser.add_argument("--rows", type=int, default=64, help="global batch")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row")
    parser.add_argument("--patches", type=int, default=4096, help="image patches per row")
    parser.add_argument("--tensor", type=int, default=1, help="size of the tensor axis")
    add_commit(parser)
    args = parser.parse_args()
    for topology in args.topology or ["v5p:4x4x4", "v6e:8x8"]:
        started = time.perf_counter()
        report, ran = compile_step(
            topology, rows=args.rows, length=args.length, patches=args.patches, tensor=args.tensor
        )
        hbm = HBM[topology.split(":")[0]]
        line = {
            "topology": topology,
            "rows": args.rows,
            "length": args.length,
            "patches": args.patches,
        }
        line |= {"tensor": args.tensor, "compile_s": round(time.perf_counter() - started, 1)}
        line |= {
            f"{k}_GB": round(getattr(report, k) / 1e9, 3)
            for k in ("arguments", "outputs", "temporaries", "peak")
        }
        line |= {"hbm_GB": hbm / 1e9, "fits": report.peak < hbm, "ran": ran}
        found = collectives(report.hlo)
        line["collectives"] = {
            kind: n
            for kind in COLLECTIVES
            if (n := sum(n for (k, _), n in found.items() if k == kind))
        }
        line["of_rows"] = of_rows(found, args.length)
        record("pods", args.commit, line)


if __name__ == "__main__":
    main()
