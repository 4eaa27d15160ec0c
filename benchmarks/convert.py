"""Import and export of a full-size checkpoint: seconds and peak anonymous memory.

Examples:

    # about 5 minutes on 2 cores
    python -m benchmarks.convert --folder DISK_WITH_30_GB

    # a quick look at a small model; records nothing
    python -m benchmarks.convert --layers 4

Writes a synthetic InfiniteVL of 4.4 B random bf16 parameters in 4 safetensors shards (8.8 GB). Runs
`convert_torch.py import` and `export` as a user does. Compares name, dtype, shape and bytes of
every tensor. The result goes to benchmarks/results/convert.jsonl.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.record import add_commit, record
from infinitevl_jax.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from infinitevl_jax.checkpoints.weights import count, leaves
from infinitevl_jax.config.model import hybrid_pattern, infinitevl_4b
from infinitevl_jax.families.huggingface import to_huggingface

ROOT = Path(__file__).resolve().parents[1]
BF16 = np.dtype(ml_dtypes.bfloat16)
SHARDS = 4


def write_source(folder: Path, config) -> int:
    """Write a Hugging Face folder with random weights; returns the bytes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(to_huggingface(config) | {"torch_dtype": "bfloat16"}, indent=2)
    )
    tensors = [
        (name, BF16, leaf.torch_shape)
        for leaf in leaves(config, scanned=False)
        for name in leaf.torch
    ]
    sizes = np.cumsum([np.prod(shape) * 2 for _, _, shape in tensors])
    total, weight_map = int(sizes[-1]), {}
    rng = np.random.Generator(np.random.SFC64(0))
    for shard in range(SHARDS):
        part = [
            t
            for t, end in zip(tensors, sizes, strict=True)
            if min(int((end - 1) * SHARDS // total), SHARDS - 1) == shard
        ]
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        writer = SafetensorsWriter(folder / file, part, {"format": "pt"})
        for name, _, shape in part:
            bits = rng.integers(0, 1 << 16, size=shape, dtype=np.uint16) & np.uint16(
                0xBFFF
            )  # finite: |x| < 2
            writer.put(name, bits.view(BF16))
        writer.close()
        weight_map |= dict.fromkeys((name for name, _, _ in part), file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def measured(*command: str) -> dict[str, float]:
    """Run a command of `convert_torch.py`.

    Returns its seconds and its peak anonymous memory (without page cache), sampled every 20 ms.
    """
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "convert_torch.py"), *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )

    def sample():
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            lines = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max(peak, int(lines[0]) * 1024 if lines else 0)
            time.sleep(0.02)

    thread = threading.Thread(target=sample)
    thread.start()
    thread.join()
    if process.wait():
        raise SystemExit(f"convert_torch.py {command[0]} failed")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_anonymous_bytes": peak}


def compare(a: Path, b: Path) -> int:
    """Compare name, dtype, shape and bytes of all tensors.

    Returns the number of tensors. Raises AssertionError at the first difference.
    """

    def tensors(folder: Path):
        return {
            name: file
            for path in sorted(folder.glob("*.safetensors"))
            for file in [SafetensorsFile(path)]
            for name in file.entries
        }

    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        x, y = left[name].array(name), right[name].array(name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        x, y = x.reshape(-1).view(np.uint16), y.reshape(-1).view(np.uint16)
        assert all(
            np.array_equal(x[i : i + (1 << 24)], y[i : i + (1 << 24)])
            for i in range(0, x.size, 1 << 24)
        ), name
    return len(left)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", default=".", help="a folder with 30 GB free for temporary files"
    )
    parser.add_argument(
        "--layers", type=int, default=36, help="fewer for a quick look; records nothing"
    )
    add_commit(parser)
    args = parser.parse_args()
    config = infinitevl_4b()
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, layer_types=hybrid_pattern(args.layers))
    )
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        nbytes = write_source(work / "src", config)
        imported = measured("import", str(work / "src"), str(work / "ours"))
        exported = measured("export", str(work / "ours"), str(work / "back"))
        tensors = compare(work / "src", work / "back")
    finally:
        shutil.rmtree(work)
    figures = {
        **{name: importlib.metadata.version(name) for name in ("orbax-checkpoint", "numpy")},
        "parameters": count(config),
        "bytes": nbytes,
        "tensors_equal": tensors,
        "import": imported,
        "export": exported,
    }
    if args.layers == 36:
        record("convert", args.commit, figures)
    else:
        print(figures)


if __name__ == "__main__":
    main()
