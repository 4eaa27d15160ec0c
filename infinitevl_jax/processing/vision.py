"""Pictures and videos of a conversation, as patches and as the model's input arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.processing.folder import override
from infinitevl_jax.processing.images import ImageOptions, load_image, patchify, process_image
from infinitevl_jax.processing.messages import Media
from infinitevl_jax.processing.video import VideoOptions, load_video


@dataclass(frozen=True)
class Vision:
    """A processed picture or video: patches [n, features] f32, grid (t, h, w) in patches, the
    tokens it becomes."""

    media: Media
    patches: np.ndarray
    grid: tuple[int, int, int]
    tokens: int
    second_per_grid: float = 0.0


def process(media: Media, images: ImageOptions, videos: VideoOptions) -> Vision:
    """Read a picture or video and cut it into patches. Its own options come before the general
    ones.

    Raises InfiniteVLError, naming the item, for one that cannot be read.
    """
    values = dict(media.options)
    sides = [values.pop(name, None) for name in ("resized_height", "resized_width")]
    if (sides[0] is None) != (sides[1] is None):
        raise InfiniteVLError(
            f"{media.where} gives only one of resized_height and resized_width",
            "give both or neither",
        )
    size = (
        None
        if sides[0] is None
        else (_positive(sides[0], media.where), _positive(sides[1], media.where))
    )
    try:
        if media.kind == "image":
            options = override(images, values, media.where)
            patches, grid = process_image(load_image(media.source, media.name), options, size)
            return Vision(media, patches, grid, len(patches) // options.merge_unit)
        if "nframes" in values:
            values["num_frames"] = values.pop("nframes")
        options = override(videos, values, media.where)
        video = load_video(media.source, options, size, media.name)
    except InfiniteVLError as error:
        if media.where in error.culprit:
            raise
        raise InfiniteVLError(f"{media.name}: {error.culprit}", error.cure) from error
    patches, grid = patchify(video.frames, options)
    return Vision(
        media,
        patches,
        grid,
        len(patches) // options.merge_unit,
        float(options.temporal_patch_size / video.fps),
    )


def arrays(vision: Sequence[Vision]) -> dict[str, np.ndarray]:
    """The model's inputs, named as in Hugging Face. Pictures follow one another: pixel_values
    [patches, features] f32 with image_grid_thw [images, 3] int32, pixel_values_videos with
    video_grid_thw [videos, 3] and second_per_grid_ts [videos] f64. What there is none of is left
    out."""
    out: dict[str, np.ndarray] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [v for v in vision if v.media.kind == kind]
        if chosen:
            out[pixels] = (
                chosen[0].patches
                if len(chosen) == 1
                else np.concatenate([v.patches for v in chosen])
            )
            out[grids] = np.asarray([v.grid for v in chosen], np.int32)
            if kind == "video":
                out["second_per_grid_ts"] = np.asarray(
                    [v.second_per_grid for v in chosen], np.float64
                )
    return out


def _positive(value: object, where: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not 1 <= value <= 1 << 20
    ):
        raise InfiniteVLError(
            f"{where}: resized_height or resized_width is {shown(value)}",
            "give pixels, an integer from 1 to 1,048,576",
        )
    return int(value)
