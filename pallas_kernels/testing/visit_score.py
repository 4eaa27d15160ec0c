"""Scores the attention kernels for TPU without one: libtpu compiles them on any CPU and tells what
the chip would execute.

    score = max(cycles / clock, bytes / HBM rate)

The steps of these kernels differ: some begin or end a row of blocks, some need no mask, and each
loops over heads. The bundles (one a cycle) are therefore counted by region of the compiled program.
Regions are the loops that multiply (without a mask, with it, on the diagonal), other large regions,
which run once a row of blocks, and the rest, which runs in every step. Each is weighted by how
often it runs, from the list of visits. Bytes are the blocks that change between steps. The score is
an estimate: it sees no stalls on memory or DMA. It counts one core; a v5p has two, and the blocks
of heads spread over them.

Compiling happens in a process of its own, because the compiler reads its dump flags once.
"""

import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pallas_kernels.testing.static_score import CHIPS, TOPOLOGIES

KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
CASES = {
    "decoder layer": {"length": 8192, "heads": 16, "key_heads": 2, "width": 128, "window": 8192},
    "tower, windows": {
        "length": 4096,
        "heads": 16,
        "key_heads": 16,
        "width": 80,
        "window": 64,
        "causal": False,
        "segment": 64,
    },
    "tower, slices": {
        "length": 4096,
        "heads": 16,
        "key_heads": 16,
        "width": 80,
        "window": 1024,
        "causal": False,
        "segment": 1024,
    },
}
"""Cases whose scores are recorded, as `scores` takes them."""

# Bundles. Smaller regions without products, mostly waits for copies, count in every step.
SMALL = 300
DELAY = 5  # bundles from a jump to the first that it may skip
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2}(?:/[A-Z]{2})*)?\s*:([ >]*)\{")
JUMP = re.compile(r"sbr\.rel \(!?%p\w+\) target")


@dataclasses.dataclass(frozen=True)
class Bundles:
    """whole, masked, diagonal: of one head in a step without a mask, with one, and on the diagonal
    (0: there is none). mask, diagonal_mask: of the masks. row_head, row: where a row of blocks
    begins and ends, for each head and once. step: of every step."""

    whole: int
    masked: int
    diagonal: int
    mask: int
    diagonal_mask: int
    row_head: int
    row: int
    step: int


@dataclasses.dataclass(frozen=True)
class Score:
    """spills: stores of registers to memory, in all bundles. visits: steps for each block of
    heads. cycles, bytes: of a call. temporaries: bytes of HBM that the forward and the backward
    pass together use besides their inputs and results."""

    chip: str
    kernel: str
    bundles: Bundles
    spills: int
    visits: int
    cycles: int
    bytes: int
    temporaries: int

    @property
    def milliseconds(self) -> float:
        return 1e3 * max(
            self.cycles / CHIPS[self.chip].clock, self.bytes / CHIPS[self.chip].bandwidth
        )


def scores(chip: str, **case) -> list[Score]:
    """The three kernels at a case: length, heads, key_heads, width, window, causal, segment (length
    of each, or None).

    RuntimeError with the compiler's last words where it fails.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        dump = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=final"
        )
        environment |= {"LIBTPU_INIT_ARGS": dump, "JAX_PLATFORMS": "cpu"}
        environment |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        command = [
            sys.executable,
            "-m",
            "pallas_kernels.testing.visit_score",
            json.dumps({"chip": chip, "folder": folder, **case}),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        result = Path(folder) / "scores.json"
        if not result.exists():
            raise RuntimeError(
                f"attention does not compile for {chip}: {case}\n{done.stderr[-3000:]}"
            )
        return [
            Score(**{**x, "bundles": Bundles(**x["bundles"])})
            for x in json.loads(result.read_text())
        ]


# In the process that compiles.


def _compile(
    chip, folder, length, heads, key_heads, width, window, causal=True, segment=None
) -> list[Score]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.attention import Mask
    from pallas_kernels.attention.tpu import attention as attention_tpu
    from pallas_kernels.attention.tpu.plan import DIAGONAL, FLAG_BITS, WHOLE, reach, visits

    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("one",))
    mask = Mask(causal, window, aligned=True)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(
            (1, *shape), dtype, sharding=NamedSharding(mesh, PartitionSpec())
        )

    def run(q, k, v, index, d_out, d_lse):
        packed = (index, index) if segment else (None, None)
        outputs, pull = jax.vjp(
            lambda *x: attention_tpu.attention(*x, index, index, *packed, mask, width**-0.5),
            q,
            k,
            v,
        )
        return outputs, pull((d_out, d_lse))

    q, k = array(length, heads, width), array(length, key_heads, width)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run)
            .lower(
                q, k, k, array(length, dtype=jnp.int32), q, array(length, heads, dtype=jnp.float32)
            )
            .compile()
        )
    temporaries = compiled.memory_analysis().temp_size_in_bytes

    index = np.arange(length, dtype=np.int32)[None]
    segments = index // segment if segment else None
    tuning = attention_tpu.tuned(length, length, mask, jnp.bfloat16)
    found = []
    for name, block in zip(KERNELS, (tuning.forward, tuning.queries, tuning.keys), strict=True):
        by_key = name == KERNELS[2]
        static = attention_tpu.Static(mask, 1.0, None, tuning)
        who, options = attention_tpu.kernel_call(
            q, k, reach(index, index, segments, segments, mask), block, static
        )
        visited = jax.jit(visits, static_argnums=(1, 2, 3, 4))(
            who, mask, block.rows, block.keys, by_key
        )
        count = int(visited.count)
        outer, inner = np.asarray(visited.outer)[:count], np.asarray(visited.inner)[:count]
        bundles, spills = read(folder, name)
        step_heads = options["heads"][0]
        groups = heads // step_heads
        rows = len(set(outer >> FLAG_BITS))
        whole, diagonal = (int(np.sum(outer & kind != 0)) for kind in (WHOLE, DIAGONAL))
        masked = count - whole - diagonal
        cycles = heads * (
            whole * bundles.whole + masked * bundles.masked + diagonal * bundles.diagonal
        )
        cycles += groups * (
            masked * bundles.mask + diagonal * bundles.diagonal_mask + count * bundles.step
        )
        cycles += groups * rows * (bundles.row + options["heads"][by_key] * bundles.row_head)
        # Blocks of the side that stays, and of the other.
        moved = (rows, 1 + int(np.sum(np.diff(inner) != 0)))
        query, key = (
            2 * 128 * heads * block.rows,
            2 * 128 * block.keys * options["heads"][1] * groups,
        )
        if by_key:  # k, v, dk, dv; q and d_out
            traffic = moved[0] * key * 4 + moved[1] * query * 2
        else:  # q and out, or q, d_out and dq; k and v
            traffic = moved[0] * query * (2 if name == KERNELS[0] else 3) + moved[1] * key * 2
        found.append(Score(chip, name, bundles, spills, count, cycles, traffic, temporaries))
    return found


def read(folder: str, name: str) -> tuple[Bundles, int]:
    """Bundles and spills of one kernel, from the compiler's dump."""
    # JAX adds to the kernel's name: jvp_attention_forward_.1
    (program,) = glob.glob(f"{glob.escape(folder)}/*{name}_*-[0-9][0-9]-final_bundles.txt")
    (table,) = glob.glob(
        f"{glob.escape(folder)}/*{name}_*-[0-9][0-9]-final_hlo-static-per-bundle-utilization.txt"
    )
    head, body = Path(table).read_text().split("== UTILIZATION:")
    columns = [
        column.strip() for column in head.split(":", 1)[1].strip().splitlines()[0].split(",")
    ]
    use = [
        dict(zip(columns, map(int, x.split()), strict=True))
        for x in body.splitlines()
        if re.fullmatch(r"[\d ]+", x)
    ]
    regions, loops = _regions(Path(program).read_text())

    def products(region):
        return sum(row["MATMUL"] for row in use[slice(*region)])

    def size(regions):
        return sum(stop - start for start, stop in regions)

    def inside(region, others):
        return [x for x in others if region[0] <= x[0] and x[1] <= region[1] and x != region]

    multiply = [x for x in loops if products(x)]
    if len(multiply) not in (2, 3):
        raise ValueError(
            f"{name}: {len(multiply)} loops that multiply, not without a mask, with one, and"
            " perhaps on the diagonal"
        )
    around = [
        min((x for x in regions if inside(x, [y])), key=lambda x: x[1] - x[0]) for y in multiply
    ]
    loop_sizes = [size([x]) for x in multiply] + [0] * (3 - len(multiply))
    masks = [size([x]) - size([y]) for x, y in zip(around, multiply, strict=True)][1:] + [0] * (
        3 - len(multiply)
    )
    rows = [x for x in regions if not products(x) and (x[1] - x[0] > SMALL or inside(x, loops))]
    rows = [x for x in rows if not any(inside(y, [x]) for y in rows)]
    row_heads = [x for y in rows for x in inside(y, loops)]
    step = len(use) - size([*around, *rows]) + size(around[:1]) - size(multiply[:1])
    bundles = Bundles(*loop_sizes, *masks, size(row_heads), size(rows) - size(row_heads), step)
    return bundles, sum(x["VSTORE:SPILL"] for x in use)


def _regions(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Regions of bundles that a jump may skip, and loops without jumps inside the loop over the
    grid's steps."""
    open_regions, regions, loops, start = [], [], [], None
    for line in text.splitlines():
        if not (found := BUNDLE.match(line)):
            continue
        at, label, depth = int(found[1], 0), found[2] or "", found[3].count(">")
        if "LB" in label and depth > 1:
            start = at
        if "PF" in label and open_regions:
            regions.append((open_regions.pop(), at))
        if JUMP.search(line):
            # What follows a loop may already run in the last bundles of its body.
            if start is not None:
                loops.append((start, at + DELAY))
                start = None
            else:
                open_regions.append(at)
    return sorted(regions), sorted(loops)


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    found = _compile(**work)
    Path(work["folder"], "scores.json").write_text(
        json.dumps([dataclasses.asdict(x) for x in found])
    )
