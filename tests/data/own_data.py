"""Small files of every kind of source, a processor of bytes, and what a row's tokens say."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tiny_folder import IDS, tiny_config, write_tokenizer

from infinitevl_jax import Processor
from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources import open_source

PADS = {IDS["<|image_pad|>"]: "<I>", IDS["<|video_pad|>"]: "<V>"}


def write_photos(folder: Path, names="abc") -> Path:
    """Pictures of different sizes: a.png, b.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        picture = rng.integers(0, 255, (8 + 4 * i, 12, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def write_film(path: Path) -> Path:
    """A film of four frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for shade in range(4):
            frame = np.full((16, 16, 3), 60 * shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_rows(path: Path, rows: list, lines: bool | None = None) -> Path:
    """A JSON array, or JSONL by suffix. A row that is bytes is written as it is."""
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    lines = path.suffix == ".jsonl" if lines is None else lines
    path.write_bytes(b"\n".join(texts) + b"\n" if lines else b"[" + b",\n ".join(texts) + b"]")
    return path


def byte_processor(folder: Path) -> Processor:
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


def rows_of(path: Path, split: str = "train", **keys):
    """The source of a file."""
    return open_source(SourceConfig(path=str(path), **keys), split)


def encoder_of(source, processor: Processor) -> Encoder:
    return Encoder(source, processor, tiny_config())


def words(tokens: np.ndarray, processor: Processor) -> str:
    """Text of tokens; a run of image or video tokens is one mark."""
    text, last = "", None
    for token in tokens.tolist():
        mark = PADS.get(token)
        text += "" if mark and token == last else mark or f"\0{token}\0"
        last = token
    parts = text.split("\0")
    out, ids = "", []
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(int(part))
        elif part:
            out, ids = out + processor.decode(ids, skip_special_tokens=False) + part, []
    return out + processor.decode(ids, skip_special_tokens=False)


def learnt(piece, processor: Processor) -> str:
    """The words that bear loss."""
    return words(piece.branch.tokens[piece.branch.answer], processor)
