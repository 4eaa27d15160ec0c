"""Pixels for the vision tower: patches of any number of images and videos, in window order, packed
into rows and padded.

The tower compiles once for each shape, not for each image size. A row holds a bucket of patches,
2^k or 3 * 2^(k-1), so at most a third of it is padding; the longest temporal slice is rounded up to
a power of two.
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
    """Packed patches in window order. `slice_reach` is static: a new value compiles anew."""

    pixels: np.ndarray  # [rows, patches, features] f32
    row_column: np.ndarray  # [rows, patches, 2] int32 place of the patch in its image
    patch_index: np.ndarray  # [rows, patches] int32 place in the row, -1 = padding
    window_ids: np.ndarray  # [rows, patches] int32 attention window, -1 = padding
    slice_ids: np.ndarray  # [rows, patches] int32 temporal slice, -1 = padding
    # no temporal slice has more patches than this
    slice_reach: int = dataclasses.field(metadata={"static": True})


def bucket(count: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least of 64, 96, 128, 192, 256, ... (2^k and 3 * 2^(k-1)) that holds `count`."""
    size = smallest
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def reach(patches: int) -> int:
    """The power of two that holds a temporal slice of so many patches."""
    return 1 << (patches - 1).bit_length()


def window_order(grid: Sequence[int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Merged tokens of one image or video sorted by attention window.

    Args:
      grid: (frames, rows, columns) in patches, frames counted after temporal patching.

    Returns:
      order [tokens]: which merged token (in the order t, row, column) stands at each place.
      window [tokens]: window ids from 0, ascending. Windows are row-major in each temporal slice; a
        grid that does not fill them has smaller ones at its edges.
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


def pack_patches(
    pixels: np.ndarray | None,
    grids: np.ndarray,
    config: VisionConfig,
    rows: Sequence[int],
    row_count: int,
    size: int | None = None,
) -> tuple[Patches, np.ndarray]:
    """Pack the patches of all images and videos.

    Args:
      pixels: [patches, features] of all items, one after the other, in the processor's order; None
        where there are no items.
      grids: [items, 3] frames, rows, columns in patches.
      rows: for each item the packed row, one of `row_count`, that it goes to.
      size: patches of a packed row; None = the bucket of the fullest row.

    Returns:
      The packed patches, and place [merged tokens]: where in its row (in merged tokens) each token
      of the processor's order is.

    Raises InfiniteVLError for pixels and grids that do not fit each other or the tower.
    """
    if pixels is None:
        pixels = np.zeros((0, config.patch_features), np.float32)
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
    np.add.at(used, np.asarray(rows, int), counts)
    fullest, longest = int(used.max(initial=0)), max((int(g[1] * g[2]) for g in grids), default=1)
    if size is None:
        size = bucket(fullest)
    elif fullest > size:
        raise InfiniteVLError(
            f"the images of one row have {fullest} patches, a packed row holds {size}",
            "make images smaller, or pack fewer into a row",
        )
    else:  # every batch has one shape, however large its images
        longest = size
    packed = Patches(
        pixels=np.zeros((row_count, size, config.patch_features), pixels.dtype),
        row_column=np.zeros((row_count, size, 2), np.int32),
        patch_index=np.full((row_count, size), -1, np.int32),
        window_ids=np.full((row_count, size), -1, np.int32),
        slice_ids=np.full((row_count, size), -1, np.int32),
        slice_reach=reach(longest),
    )
    place = np.empty(int(counts.sum()) // unit, np.int64)
    filled, windows, slices = np.zeros((3, row_count), int)
    source = 0
    for grid, row, count in zip(grids, rows, counts, strict=True):
        order, window = window_order(grid, config)
        patch_order = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        here = slice(filled[row], filled[row] + count)
        np.take(  # clip: without a copy in between
            pixels[source : source + count],
            patch_order,
            0,
            out=packed.pixels[row, here],
            mode="clip",
        )
        packed.row_column[row, here] = _patch_places(grid, config.spatial_merge_size)[patch_order]
        packed.patch_index[row, here] = np.arange(here.start, here.stop)
        packed.window_ids[row, here] = np.repeat(window, unit) + windows[row]
        packed.slice_ids[row, here] = patch_order // (grid[1] * grid[2]) + slices[row]
        place[source // unit + order] = filled[row] // unit + np.arange(count // unit)
        filled[row] += count
        windows[row] += window[-1] + 1
        slices[row] += grid[0]
        source += count
    return packed, place
