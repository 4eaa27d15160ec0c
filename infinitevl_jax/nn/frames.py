"""Frames of a video stream on the device: bytes to normalised patches, in the tower's order."""

import dataclasses

import jax.numpy as jnp
from einops import rearrange, repeat

from infinitevl_jax.inputs.frame import Frame
from infinitevl_jax.inputs.patches import Patches


def frame_patches(frame: Frame) -> Patches:
    """The patches of a frame, as `infinitevl_jax.inputs.patches.pack_patches` lays out those that
    `infinitevl_jax.processing.images.patchify` cuts on the host (<= 1e-6)."""
    layout = frame.layout
    side = frame.pixels.shape[1] // 3
    row, column = layout.row_column[0, :, 0], layout.row_column[0, :, 1]
    lines = (row[:, None] * side + jnp.arange(side)) * frame.columns + column[:, None]
    pixels = frame.pixels[lines].reshape(*lines.shape, side, 3).astype(jnp.float32)
    pixels = pixels * frame.scale - frame.shift  # [patches, row, column, channel]
    pixels = rearrange(pixels, "n y x c -> n c y x")
    pixels = repeat(pixels, "n c y x -> n (c t y x)", t=frame.span)
    valid = layout.patch_index[0, :, None] >= 0
    return dataclasses.replace(layout, pixels=jnp.where(valid, pixels, 0)[None])
