"""Pixels for the vision tower: patches of any number of images and videos, reordered by window,
packed and padded to a bucket.

Host side (numpy). The tower compiles once a bucket, not once an image size: a packed row holds 2^k
or 3 * 2^(k-1) patches, so at most a third of it is padding; its longest temporal slice is rounded
up to a power of two.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from infinitevl_jax.config.model import VisionConfig
from infinitevl_jax.errors import InfiniteVLError

SMALLEST_BUCKET = 64  # patches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patches:
    """Rows of packed patches in window order. `slice_reach` is static: a new value compiles
    anew."""

    pixels: np.ndarray  # [rows, patches, features] f32
    row_column: np.ndarray  # [rows, patches, 2] int32 place of the patch in its image
    index: np.ndarray  # [rows, patches] int32 ordinal in the row, -1 = padding
    window: np.ndarray  # [rows, patches] int32 attention window
    slice: np.ndarray  # [rows, patches] int32 temporal slice
    slice_reach: int = dataclasses.field(metadata={"static": True})


def bucket(count: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least of 64, 96, 128, 192, 256, ... (2^k and 3 * 2^(k-1)) that holds `count`."""
    size = smallest
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def window_order(grid: Sequence[int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Merged tokens of one image or video sorted by attention window.

    Args:
      grid: (frames, rows, columns) in patches, frames counted after temporal patching.

    Returns:
      order [tokens]: which merged token (in the order t, row, column) stands at each place; window
        [tokens]: ids from 0, rising.
      Windows are row-major per temporal slice; a grid that does not fill them leaves smaller ones
      at its edges.
    """
    frames, rows, columns = (
        grid[0],
        grid[1] // config.spatial_merge_size,
        grid[2] // config.spatial_merge_size,
    )
    t, r, c = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    side = config.window_tokens
    windows_down, windows_across = -(-rows // side), -(-columns // side)
    window = ((t * windows_down + r // side) * windows_across + c // side).reshape(-1)
    order = np.argsort(window, kind="stable")
    return order, window[order]


def _patch_places(grid: Sequence[int], merge: int) -> np.ndarray:
    """[patches, 2] row and column of each patch in the processor's order: t, merged row, merged
    column, row in 2x2, column in 2x2."""
    frames, rows, columns = grid
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    places = (
        places.reshape(rows // merge, merge, columns // merge, merge, 2)
        .swapaxes(1, 2)
        .reshape(-1, 2)
    )
    return np.tile(places, (frames, 1))


def pack(
    pixels: np.ndarray, grids: np.ndarray, config: VisionConfig, rows: Sequence[int], row_count: int
) -> tuple[Patches, np.ndarray]:
    """Pack the patches of all images and videos.

    Args:
      pixels: [patches, features] of all of them, one after the other, as the processor gives them.
      grids: [items, 3] (frames, rows, columns) in patches.
      rows: which of `row_count` packed rows each item goes to.

    Returns:
      The packed patches, and place [merged tokens]: where in its row (in merged tokens) each token
        of the processor's order ends up.
    """
    counts = grids.prod(1) if len(grids) else np.zeros(0, int)
    if pixels.ndim != 2 or pixels.shape[1] != config.patch_features:
        raise InfiniteVLError(
            f"pixel values have shape {pixels.shape}, the tower takes [patches,"
            f" {config.patch_features}]",
            "use the processor of this checkpoint (patch_size and temporal_patch_size must agree)",
        )
    if counts.sum() != len(pixels):
        raise InfiniteVLError(
            f"grid_thw {grids.tolist()} describes {int(counts.sum())} patches, pixel values hold"
            f" {len(pixels)}",
            "pass the grid_thw that the processor returned with these pixel values",
        )
    if bad := [
        g.tolist()
        for g in grids
        if g.min() < 1 or g[1] % config.spatial_merge_size or g[2] % config.spatial_merge_size
    ]:
        raise InfiniteVLError(
            f"grid_thw {bad[0]} is not made of whole"
            f" {config.spatial_merge_size}x{config.spatial_merge_size} patch groups",
            "resize images to multiples of patch_size x merge_size, as the processor does",
        )
    unit = config.merge_unit
    used = np.zeros(row_count, int)
    np.add.at(used, rows, counts)
    size = bucket(int(used.max(initial=0)))
    packed = Patches(
        pixels=np.zeros((row_count, size, config.patch_features), pixels.dtype),
        row_column=np.zeros((row_count, size, 2), np.int32),
        index=np.full((row_count, size), -1, np.int32),
        window=np.full((row_count, size), -1, np.int32),
        slice=np.full((row_count, size), -1, np.int32),
        slice_reach=1 << int(max((g[1] * g[2] for g in grids), default=1) - 1).bit_length(),
    )
    place = np.empty(int(counts.sum()) // unit, np.int64)
    filled, windows, slices, source = (
        np.zeros(row_count, int),
        np.zeros(row_count, int),
        np.zeros(row_count, int),
        0,
    )
    for grid, row, count in zip(grids, rows, counts, strict=True):
        order, window = window_order(grid, config)
        patch_order = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        here = slice(filled[row], filled[row] + count)
        packed.pixels[row, here] = pixels[source : source + count][patch_order]
        packed.row_column[row, here] = _patch_places(grid, config.spatial_merge_size)[patch_order]
        packed.index[row, here] = np.arange(here.start, here.stop)
        packed.window[row, here] = np.repeat(window, unit) + windows[row]
        packed.slice[row, here] = patch_order // (grid[1] * grid[2]) + slices[row]
        place[source // unit + order] = filled[row] // unit + np.arange(count // unit)
        filled[row] += count
        windows[row] += window[-1] + 1
        slices[row] += grid[0]
        source += count
    return packed, place
