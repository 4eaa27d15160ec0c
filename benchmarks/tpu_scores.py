"""Static scores for TPU, on any CPU: what the compiler would execute and move, no chip involved
(pallas_kernels.testing.static_score).

    # The kernels; into benchmarks/results/tpu_scores.jsonl.
    python -m benchmarks.tpu_scores

    # One operator's kernels.
    python -m benchmarks.tpu_scores --op gated_delta_rule

    # Whole operators as well, XLA's programs with the kernels, and decoding steps: minutes each.
    python -m benchmarks.tpu_scores --whole

    # Decoding steps of the published model by XLA, for one and for eight sequences with full
    # windows. limit_ms is the time to move what a step has to: each weight once, and the caches.
    python -m benchmarks.tpu_scores --op decode --chip v5e --chip v6e

One line for each kernel (or whole operator, or step) and each generation; kernels take about 5 s
each, those of attention 30 s.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from benchmarks.inference.card import decode_bytes
from benchmarks.record import add_commit, record
from benchmarks.tpu_programs import decode_step, gdn_layer, text_model
from pallas_kernels.testing.static_score import CHIPS, TOPOLOGIES, Program, score
from pallas_kernels.testing.tpu_programs import conv_kernels, gdn_kernels, gdn_op
from pallas_kernels.testing.visit_score import CASES, scores


class Entry(NamedTuple):
    op: str
    name: str
    build: Callable  # as `score` takes it
    places: tuple  # its arguments
    names: dict


GDN = {"length": 8192, "heads": 16}
KERNELS = [
    *(
        Entry("gated_delta_rule", name, gdn_kernels, (name,), GDN)
        for name in ("inverse", "chunk_scan", "backward")
    ),
    Entry(
        "gated_delta_rule",
        "chunk_scan, nothing saved",
        gdn_kernels,
        ("chunk_scan",),
        GDN | {"save": False},
    ),
    Entry(
        "causal_conv", "forward + backward", conv_kernels, (), {"length": 8192, "channels": 4096}
    ),
]
WHOLE = [
    Entry(
        "gated_delta_rule",
        f"{whole}{what}, {implementation}",
        build,
        (implementation, gradient),
        GDN,
    )
    for whole, build in (("", gdn_op), ("layer, ", gdn_layer))
    for what, gradient in (("forward", False), ("forward + backward", True))
    for implementation in ("mosaic_tpu", "scan_and_solve")
]
DECODE = [
    Entry("decode", f"a step, batch {rows}", decode_step, (), {"rows": rows}) for rows in (1, 8)
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help="only this operator's")
    parser.add_argument(
        "--chip",
        action="append",
        choices=list(CHIPS),
        help="v5e, v5p, v6e, tpu7x (several allowed; all by default)",
    )
    parser.add_argument("--whole", action="store_true", help="whole operators as well")
    add_commit(parser)
    args = parser.parse_args()
    slow = WHOLE * args.whole + DECODE * (args.whole or args.op == "decode")
    for entry in KERNELS + slow:
        for chip in args.chip or CHIPS:
            if args.op in (None, entry.op):
                line = {
                    "op": entry.op,
                    "program": entry.name,
                    "topology": TOPOLOGIES[chip],
                    **entry.names,
                }
                record("tpu_scores", args.commit, line | figures(entry, chip) | limit(entry, chip))
    for name, case in CASES.items() if args.op in (None, "attend") else ():
        for chip in args.chip or CHIPS:
            for found in scores(chip, **case):
                line = {
                    "op": "attend",
                    "program": f"{name}: {found.kernel}",
                    "topology": TOPOLOGIES[chip],
                    **case,
                }
                line |= {
                    "estimate_ms": round(found.milliseconds, 4),
                    "bytes": found.bytes,
                    "cycles": found.cycles,
                }
                line |= {
                    "bundles": dataclasses.asdict(found.bundles),
                    "spills": found.spills,
                    "visits": found.visits,
                }
                record("tpu_scores", args.commit, line)


def figures(entry: Entry, chip: str) -> dict:
    """The estimate and what it is made of, or that the compiler failed."""
    try:
        found = score(entry.build, chip, *entry.places, **entry.names)
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0]}
    line = {
        "estimate_ms": round(found.milliseconds, 4),
        "cycles": sum(p.cycles for p in found.programs),
    }
    line |= {"bytes": sum(p.bytes for p in found.programs), "programs": len(found.programs)}
    kernels: dict[str, Program] = {}
    for program in (
        p for p in found.programs if p.bundles
    ):  # those of one name differ in size or work
        kernels[
            program.name if program.name not in kernels else f"{program.name} {len(kernels)}"
        ] = program
    return line | {
        key: {name: getattr(p, key) for name, p in kernels.items()}
        for key in ("bundles", "spills", "trips")
    }


def limit(entry: Entry, chip: str) -> dict:
    """Milliseconds to move what a decoding step has to."""
    if entry.op != "decode":
        return {}
    config = text_model()
    window = config.text.sliding_window
    moved = sum(decode_bytes(config, entry.names["rows"], window, jnp.bfloat16).values())
    return {"limit_bytes": moved, "limit_ms": round(1e3 * moved / CHIPS[chip].bandwidth, 4)}


if __name__ == "__main__":
    main()
