"""The kernels of serving the published model on an H100, as XLA compiles it, without a GPU.

Examples:

    # a decoding step of one sequence: the first four layers, one of window attention
    python -m benchmarks.gpu_programs decode

    # of eight sequences, by the projection kernel
    python -m benchmarks.gpu_programs decode --rows 8 --projection mosaic_gpu,xla

    # a prompt of 8,192 tokens, and a frame of a video stream (tower and decoder)
    python -m benchmarks.gpu_programs prefill frame

    # all layers
    python -m benchmarks.gpu_programs decode --layers 36

Prints each program's kernels in order: name, result, and the operation that it came from. Nothing
is timed: compare numbers of kernels, and look for copies. `pallas_kernels/testing/gpu_programs.py`
says what has to be installed.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from infinitevl_jax.config.model import ModelConfig, infinitevl_4b
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.inputs.frame import frame_inputs
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.fuse import fuse
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import cache_spec, functional, parameters
from infinitevl_jax.processing.images import resize_image
from infinitevl_jax.processing.video import VideoOptions
from infinitevl_jax.serve.programs import STEPS, Programs
from infinitevl_jax.serve.slots import Piece, Slots, join_pieces
from pallas_kernels.testing.gpu_programs import Launch, h100, launches, on

SIDE = 448  # pixels of a frame
bf16 = jnp.bfloat16


def published(layers: int, blocks: int) -> ModelConfig:
    """The published model with so many decoder layers and tower blocks."""
    config = infinitevl_4b()
    assert config.vision is not None
    text = dataclasses.replace(config.text, layer_types=config.text.layer_types[:layers])
    last = (blocks - 1,)
    vision = dataclasses.replace(config.vision, depth=blocks, fullatt_block_indexes=last)
    return dataclasses.replace(config, text=text, vision=vision)


class Compiler:
    """Compiles the programs of a model for an H100."""

    def __init__(self, config: ModelConfig, ops: OpsConfig | None = None):
        self.config, self.device = config, h100()
        chosen = resolve_ops(Mesh(np.array([self.device]), ("data",)), ops)
        model = functional(config, scanned=False, dtype=bf16, ops=chosen)
        self.programs = Programs(model, platform="gpu")
        shapes = {
            name: jax.ShapeDtypeStruct(p.shape, bf16)
            for name, p in parameters(config, scanned=False).items()
        }
        self.params = self.place(jax.eval_shape(partial(fuse, config), shapes))

    def place(self, tree):
        return on(self.device, tree)

    def cache(self, rows: int):
        return self.place(cache_spec(self.config, rows, None, bf16))

    def slots(self, rows: int):
        return self.place(jax.tree.map(np.asarray, Slots.idle(rows, self.config.text.vocab_size)))

    def decode(self, rows: int = 1) -> str:
        """The HLO of a launch of decoding steps."""
        arguments = self.params, self.cache(rows), self.slots(rows)
        run = self.programs.decode
        return run.lower(*arguments, steps=STEPS, sampled=False).compile().as_text()

    def prefill(self, length: int = 8192) -> str:
        """Of a prompt."""
        inputs = build_inputs(self.config, np.zeros((1, length), np.int32)).decoder
        keep = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        inputs, keep = self.place((jax.tree.map(np.asarray, inputs), keep))
        run = self.programs.forward
        return run.lower(self.params, inputs, None, self.cache(1), keep).compile().as_text()

    def frame(self) -> tuple[str, str]:
        """Of a frame: tower, and decoder."""
        config = self.config
        options = VideoOptions(min_pixels=min(VideoOptions.min_pixels, SIDE**2))
        picture = resize_image(Image.new("RGB", (SIDE, SIDE)), options)
        token = config.video_token_id
        inputs = frame_inputs(config, picture, *options.normalisation, token=token, base=0, time=0)
        tower = self.programs.encode.lower(self.params, self.place(inputs.patches))
        tokens = inputs.decoder.tokens.shape[1]
        index = np.where(inputs.decoder.vision_index >= 0, np.arange(tokens), -1)
        decoder = inputs.decoder._replace(vision_index=index.astype(np.int32))
        vision = np.zeros((1, tokens, config.text.hidden_size), bf16)
        piece = Piece(decoder, vision, False)
        chunk, _ = join_pieces([(piece, 0, False, None)], 1, 2, config.text.vocab_size)
        chunk = self.place(jax.tree.map(np.asarray, chunk))
        reading = self.programs.prefill.lower(self.params, self.cache(2), chunk)
        return tower.compile().as_text(), reading.compile().as_text()


def table(found: list[Launch]) -> str:
    lines = [
        f"  {launch.name[:44]:44} {launch.kind[:16]:16} {launch.result[:56]:56}"
        f" {launch.origin[-60:]}"
        for launch in found
    ]
    return "\n".join([f"{len(found)} kernels or calls", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="+", choices=("decode", "prefill", "frame"))
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default: 4)")
    parser.add_argument("--blocks", type=int, default=2, help="of the tower (default: 2)")
    parser.add_argument("--rows", type=int, default=1, help="sequences of decode (default: 1)")
    parser.add_argument("--length", type=int, default=8192, help="of prefill (default: 8192)")
    parser.add_argument("--projection", help="its implementations, in order")
    options = parser.parse_args()
    try:
        ops = OpsConfig(projection=options.projection) if options.projection else None
        compiler = Compiler(published(options.layers, options.blocks), ops)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    runs: dict[str, Callable] = {
        "decode": lambda: {"decode": compiler.decode(options.rows)},
        "prefill": lambda: {"prefill": compiler.prefill(options.length)},
        "frame": lambda: dict(zip(("tower", "decoder"), compiler.frame(), strict=True)),
    }
    for name in options.programs:
        for part, hlo in runs[name]().items():
            print(f"{part}: {table(launches(hlo))}", flush=True)


if __name__ == "__main__":
    main()
