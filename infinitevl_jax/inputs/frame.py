"""One frame of a video stream for the model: bytes as they are, normalised and cut into patches on
the device (`infinitevl_jax.nn.frames`).

A frame is a quarter of its patches' bytes, or an eighth where a patch spans two frames. What
depends on its size alone is laid out once for each size. Arrays have bucketed shapes, as packed
patches have: the tower compiles once for each bucket.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np

from infinitevl_jax.config.model import ModelConfig, VisionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import DecoderInputs, ModelInputs
from infinitevl_jax.inputs.patches import Patches, pack_patches, reach


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frame:
    """A frame on the host. Rows of patches and pads follow one another."""

    pixels: np.ndarray  # [patches * patch_size, patch_size * 3] uint8: lines one patch long
    columns: np.ndarray  # [] int32 patches side by side in the frame
    scale: np.ndarray  # [3] f32; a normalised value is byte * scale - shift
    shift: np.ndarray  # [3] f32
    layout: Patches  # one row, whose `pixels` [1, patches, 0] are to come
    span: int = dataclasses.field(metadata={"static": True})  # frames of a patch: all this one


def frame_inputs(
    config: ModelConfig,
    pixels: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    *,
    token: int,
    base: int,
    time: int,
) -> ModelInputs:
    """The inputs of a frame that is one temporal step of a video.

    Args:
      pixels: [height, width, 3] uint8; sides are multiples of the tower's patch and merge size.
      scale, shift: [3] f32; a normalised value is byte * scale - shift.
      token: id that stands for a vision token.
      base: rotary position of row 0 and of column 0. time: temporal rotary position.

    Raises InfiniteVLError for a frame that does not fit the tower.
    """
    vision = config.vision
    if vision is None:
        raise InfiniteVLError("a text model reads no frames", "load a model with a vision tower")
    patch = vision.patch_size
    height, width, channels = pixels.shape
    if vision.in_channels != channels:
        raise InfiniteVLError(
            f"the tower takes {vision.in_channels} channels, a frame has {channels}",
            "load a model for RGB images",
        )
    if height % (patch * vision.spatial_merge_size) or width % (patch * vision.spatial_merge_size):
        raise InfiniteVLError(
            f"a frame has {height} x {width} pixels (height x width), not whole groups of"
            f" {vision.spatial_merge_size} x {vision.spatial_merge_size} patches",
            "resize it as the processor of this checkpoint does",
        )
    rows, columns = height // patch, width // patch
    layout, place = _layout(rows, columns, vision)
    lines = np.zeros((layout.patch_index.shape[1] * patch, patch * 3), np.uint8)
    lines[: rows * columns * patch] = pixels.reshape(-1, patch * 3)
    merge = vision.spatial_merge_size
    count = len(place)
    row, column = np.divmod(np.arange(count), columns // merge)
    ordinal = np.arange(count, dtype=np.int32)[None]
    decoder = DecoderInputs(
        tokens=np.full((1, count), token, np.int32),
        token_index=ordinal,
        segment_ids=np.zeros((1, count), np.int32),
        positions=np.stack([np.full(count, time), base + row, base + column])[:, None],
        vision_index=place[None],
    )
    frame = Frame(
        lines,
        np.int32(columns),
        np.asarray(scale, np.float32),
        np.asarray(shift, np.float32),
        layout,
        vision.temporal_patch_size,
    )
    return ModelInputs(decoder, frame, np.zeros(1, np.int64))


@lru_cache(maxsize=64)
def _layout(rows: int, columns: int, config: VisionConfig) -> tuple[Patches, np.ndarray]:
    """Where the patches of a frame go, without pixels, and `pack_patches`' place of its tokens."""
    nothing = np.broadcast_to(np.float32(0), (rows * columns, config.patch_features))
    packed, place = pack_patches(nothing, np.array([[1, rows, columns]]), config, [0], 1)
    size = packed.patch_index.shape[1]
    # one program for a bucket, whatever the frame's size
    empty = np.zeros((1, size, 0), np.float32)
    layout = dataclasses.replace(packed, pixels=empty, slice_reach=reach(size))
    for constant in (place, *vars(layout).values()):
        if isinstance(constant, np.ndarray):
            constant.setflags(write=False)
    return layout, place
