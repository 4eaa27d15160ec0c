"""Compile the 4.4 B training step (8K tokens a row, global batch 64) for TPU pods, on any CPU.

    python -m benchmarks.pods                       # v5p:4x4x4 and v6e:8x8; into
    benchmarks/results/pods.jsonl python -m benchmarks.pods --topology v6e:8x8 --tensor 2

Everything but the vision tower and the embeddings trains, in f32 with Adam's moments; activations
are bf16, every layer is recomputed in the backward pass. Several minutes a topology on two cores.
No chip is involved: memory is the compiler's own account. Each line also counts the program's
  collectives as they stand in its text (one inside a loop counts once), and names those with a
  row's length.
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
    """The training step of the published size, compiled for a pod with axes data, fsdp (all that is
    left), tensor, context; and what runs in it."""
    config, run = infinitevl_4b(), RunConfig(dtype="bfloat16", remat="full")
    mesh = pod_mesh(topology, {"data": 1, "fsdp": -1, "tensor": tensor, "context": 1})
    optimizer = make_optimizer(OptimizerConfig(), 1000, parameters(config, scanned=True))
    state = abstract_state(config, TRAINABLE, optimizer, jnp.bfloat16, mesh)
    batch = abstract_batch(config, rows, length, patches, mesh)
    ops = resolve_ops(mesh)
    step = partial(train_step, model_of(config, run, ops), optimizer)
    return compile_for_pod(step, mesh, state, batch, donate_argnums=0, text=True), ops.report()


def collectives(hlo: str) -> Counter[tuple[str, str]]:
    """How often a program's text holds each collective operation and result, such as ("all-gather",
    "bf16[2048,11008]").

    One that returns several arrays counts once for each; one that is started and awaited
    (`all-gather-start`) counts its operands too.
    """
    found = re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    return Counter(
        (kind, shape) for result, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", result)
    )


def of_rows(found: Iterable[tuple[str, str]], length: int) -> list[str]:
    """The collectives whose results have the length of a row as a dimension: tokens or activations,
    where parameters are meant."""
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
        help="v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, ... (several allowed)",
    )
    parser.add_argument("--rows", type=int, default=64, help="global batch")
    parser.add_argument("--length", type=int, default=8192, help="tokens a row")
    parser.add_argument("--patches", type=int, default=4096, help="image patches a row")
    parser.add_argument("--tensor", type=int, default=1)
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
