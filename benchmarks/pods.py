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
import re
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax.numpy as jnp  # noqa: E402  the platform is chosen first

from benchmarks.record import add_commit, record  # noqa: E402
from infinitevl_jax.config.model import infinitevl_4b  # noqa: E402
from infinitevl_jax.config.run import RunConfig  # noqa: E402
from infinitevl_jax.config.train import OptimizerConfig  # noqa: E402
from infinitevl_jax.nn.ops import resolve_ops  # noqa: E402
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.optimizer import make_optimizer  # noqa: E402
from infinitevl_jax.train.plan import abstract_batch, abstract_state  # noqa: E402
from infinitevl_jax.train.step import model_of, train_step  # noqa: E402
from pallas_kernels.testing.pods import HBM, PodReport, compile_for_pod, pod_mesh  # noqa: E402

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
TRAINABLE = [r"layers\..*", r"norm\.weight"]


def compile_step(
    topology: str, *, rows: int = 64, length: int = 8192, patches: int = 4096, tensor: int = 1
) -> tuple[PodReport, list[str]]:
    """Compile the training step of the published size for a pod.

    All chips that `tensor` does not use are on the axis `fsdp`. Returns the report of the compiler
    and the operators that run.
    """
    config, run = infinitevl_4b(), RunConfig(dtype="bfloat16", remat="full")
    mesh = pod_mesh(topology, {"data": 1, "fsdp": -1, "tensor": tensor, "context": 1})
    optimizer = make_optimizer(OptimizerConfig(), 1000, parameters(config, scanned=True))
    state = abstract_state(config, TRAINABLE, optimizer, jnp.bfloat16, mesh)
    batch = abstract_batch(config, rows, length, patches, mesh)
    ops = resolve_ops(mesh)
    step = partial(train_step, model_of(config, run, ops), optimizer)
    return compile_for_pod(step, mesh, state, batch, donate_argnums=0, text=True), ops.report()


def collectives(hlo: str) -> Counter[tuple[str, str]]:
    """Count (collective, result) pairs, such as ("all-gather", "bf16[2048,11008]"), in a program.

    A collective with several results counts once for each. An asynchronous one
    (`all-gather-start`) also counts its operands.
    """
    found = re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    return Counter(
        (kind, shape) for result, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", result)
    )


def of_rows(found: Iterable[tuple[str, str]], length: int) -> list[str]:
    """The collectives whose results have `length` as a dimension: tokens or activations."""
    return sorted(
        f"{kind} {shape}" for kind, shape in found if re.search(rf"[\[,]{length}[,\]]", shape)
    )


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
