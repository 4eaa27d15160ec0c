"""Input throughput and packing: images a second from JPEG files, and how well rows are filled.

    python -m benchmarks.data                                   # 0, 1 and 2 workers
    python -m benchmarks.data --workers 8 16 --images 2000

Each image is 448 x 448 with one question: 1,024 patches, 256 tokens. Packing: conversations of
log-normal length (median 300 tokens, at most a row) in rows of 8,192 tokens.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.record import add_commit, record

SIDE, PATCHES, ROWS, IMAGES_A_ROW = 448, 1024, 8, 4


def write_images(folder: Path, count: int) -> Path:
    """JPEG files of a photo's size (about 60 KB), and LLaVA rows about them."""
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8))
        fine = rng.normal(0, 8, (SIDE, SIDE, 3))
        pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) + fine
        name = f"{i}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
        turns = [
            {"from": "human", "value": "<image>\nWhat do you see in this picture?"},
            {"from": "gpt", "value": "Patches of colour that run into each other. " * 4},
        ]
        rows.append({"image": name, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), "utf-8")
    return path


def throughput(path: Path, workers: int, images: int) -> dict:
    """Images and tokens a second of a run's batches, after the first."""
    import jax

    from infinitevl_jax import Processor
    from infinitevl_jax.config.data import DataConfig
    from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig
    from infinitevl_jax.data.encode import Encoder
    from infinitevl_jax.data.mixture import open_mixture
    from infinitevl_jax.data.pipeline import train_batches

    jax.config.update("jax_platforms", "cpu")
    data = DataConfig(
        path=str(path),
        batch=ROWS,
        length=2048,
        patches=IMAGES_A_ROW * PATCHES,
        workers=workers,
        lookahead=8,
    )
    config = ModelConfig(TextConfig(("full_attention",)), VisionConfig())
    # nothing is kept, as with data that does not fit
    encoder = Encoder(open_mixture(data), Processor(), config, cache_bytes=0)
    batches = train_batches(encoder, config, data, 0)
    next(batches)
    began, seen, tokens = time.perf_counter(), 0, 0
    while seen < images:
        batch = next(batches)
        seen += int((batch.patches.patch_index >= 0).sum()) // PATCHES
        tokens += int((batch.branches.token_index >= 0).sum())
    seconds = time.perf_counter() - began
    batches.close()
    return {
        "part": "images",
        "side": SIDE,
        "workers": workers,
        "images": seen,
        "images_per_second": round(seen / seconds, 1),
        "tokens_per_second": round(tokens / seconds),
    }


def packing(lookahead: int, conversations: int = 20_000, length: int = 8192) -> dict:
    """Share of the tokens of rows that are used."""
    from infinitevl_jax.data.packer import Packer, Piece

    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(np.log(300), 1.0, conversations).astype(int) + 1, length)
    pieces = (Piece(i, int(size), 0) for i, size in enumerate(sizes))
    began = time.perf_counter()
    rows = len(list(Packer(pieces, length, 0, lookahead)))
    seconds = time.perf_counter() - began
    return {
        "part": "packing",
        "lookahead": lookahead,
        "length": length,
        "filled": round(float(sizes.sum()) / (rows * length), 4),
        "conversations_per_second": round(conversations / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=400, help="images of each measurement")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[1, 8, 32, 128])
    add_commit(parser)
    args = parser.parse_args()
    for lookahead in args.lookahead:
        record("data", args.commit, packing(lookahead))
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(Path(folder) / "images", args.images)
        for workers in args.workers:
            record("data", args.commit, throughput(path, workers, args.images))


if __name__ == "__main__":
    main()
