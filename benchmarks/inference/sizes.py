"""What is measured: the published model, or a tiny one that runs on a CPU in seconds."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.inference.card import Card
from benchmarks.inference.watch import Compilations
from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.config.model import (
    ModelConfig,
    TextConfig,
    VisionConfig,
    hybrid_pattern,
    infinitevl_4b,
)
from infinitevl_jax.serve.engine import Engine


@dataclass(frozen=True)
class Size:
    """A model and the cases that are measured with it.

    Attributes:
      contexts, batches: of decoding. prompts: lengths of prefill.
      side: height and width of a frame in pixels. frames: of one stream.
      streams, rounds: streams in one batch, and frames of each.
      requests: at once. lengths: shortest and longest of their prompts. new: tokens of each.
      long: tokens of the prompt that comes between them.
      chunk, steps: of engines. repeats: timed runs.
      copied: bytes of the array whose copies are timed. product: m, k, n of timed products.
      peer: lengths of the Transformer's cache.
    """

    name: str
    config: Callable[[], ModelConfig]
    dtype: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    side: int
    frames: int
    streams: int
    rounds: int
    requests: int
    lengths: tuple[int, int]
    new: int
    long: int
    chunk: int
    steps: int
    repeats: int
    copied: int
    product: tuple[int, int, int]
    peer: tuple[int, ...]


@dataclass(frozen=True)
class Bench:
    """What the parts work with.

    Attributes:
      read_all: whether contexts beyond the window are read token by token.
      rows: streams that an engine reads at once.
    """

    size: Size
    model: InfiniteVL
    processor: Processor
    card: Card
    compilations: Compilations
    read_all: bool
    rows: int

    def engine(self, slots: int, *, chunk: int | None = None, rows: int = 1) -> Engine:
        """A new engine. Earlier ones that nobody holds are freed first: each has a cache of its
        own, and refers to itself."""
        gc.collect()
        size = self.size
        return Engine(
            self.model, slots=slots, chunk=chunk or size.chunk, steps=size.steps, rows=rows
        )


def tiny() -> ModelConfig:
    """Two narrow layers and a narrow tower, with the vocabulary and patches of the published
    model."""
    text = TextConfig(
        layer_types=hybrid_pattern(2, period=2),
        hidden_size=64,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        mrope_section=(2, 3, 3),
        num_linear_heads=2,
        linear_head_dim=16,
    )
    vision = VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=(0,),
    )
    return ModelConfig(text, vision)


PUBLISHED = Size(
    name="4.4B",
    config=infinitevl_4b,
    dtype="bfloat16",
    contexts=(1024, 8192, 65536, 409_600, 1_048_576),
    batches=(1, 8, 16, 64),
    prompts=(1024, 8192, 32768, 65536),
    side=448,
    frames=300,
    streams=32,
    rounds=20,
    requests=64,
    lengths=(64, 2048),
    new=128,
    long=32768,
    chunk=512,
    steps=8,
    repeats=20,
    copied=1 << 30,
    product=(8192, 2048, 11008),
    peer=(8192, 60_000, 360_000),
)

TINY = Size(
    name="tiny",
    config=tiny,
    dtype="float32",
    contexts=(8, 32, 1024),
    batches=(1, 2),
    prompts=(16, 64),
    side=56,
    frames=20,
    streams=2,
    rounds=2,
    requests=2,
    lengths=(4, 12),
    new=8,
    long=64,
    chunk=4,
    steps=2,
    repeats=2,
    copied=1 << 20,
    product=(64, 32, 48),
    peer=(8, 16),
)

SIZES = {size.name: size for size in (PUBLISHED, TINY)}
