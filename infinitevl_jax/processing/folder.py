"""Image and video settings of a checkpoint folder, in the formats of many tool versions."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct

from infinitevl_jax import reading
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.images import ImageOptions
from infinitevl_jax.processing.video import VideoOptions

Count = Annotated[int, Meta(ge=1)]
T = TypeVar("T")
Options = TypeVar("Options", bound=ImageOptions)


class Preprocessor(Struct):
    """The supported keys of preprocessor_config.json and video_preprocessor_config.json.

    Sections of processor_config.json have the same keys.
    """

    image_processor_type: str | None = None
    video_processor_type: str | None = None
    do_resize: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    patch_size: Count | None = None
    temporal_patch_size: Count | None = None
    merge_size: Count | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    rescale_factor: float | None = None
    resample: int | None = None
    size: int | dict[str, int | None] | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    fps: float | None = None
    min_frames: Count | None = None
    max_frames: Count | None = None


class ProcessorConfig(Struct):
    """processor_config.json."""

    image_processor: Preprocessor | None = None
    video_processor: Preprocessor | None = None


class _Vision(Struct):
    patch_size: Count | None = None
    temporal_patch_size: Count | None = None
    spatial_merge_size: Count | None = None


class _Config(Struct):
    vision_config: _Vision | None = None


# name here -> name in the file
_NAMES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "merge_size",
    "mean": "image_mean",
    "std": "image_std",
    "rescale_factor": "rescale_factor",
    "resample": "resample",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}
_VIDEO_NAMES = {name: name for name in ("fps", "min_frames", "max_frames")}
_GEOMETRY = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def read_json(path: Path, kind: type[T] = dict[str, Any]) -> T:
    """Read a JSON file as `kind`; `kind()` if the file does not exist."""
    return reading.read_json(path, kind) if path.exists() else kind()


def image_options(folder: Path) -> ImageOptions:
    """Image settings of a folder.

    They come from processor_config.json (image_processor) or preprocessor_config.json, then from
    the geometry in config.json, then from the defaults.
    """
    path, entries = _entries(folder, "image_processor", "preprocessor_config.json")
    _check_family(path, entries, entries.image_processor_type)
    return _options(ImageOptions, path, _values(path, entries, _NAMES), folder)


def video_options(folder: Path) -> VideoOptions:
    """Video settings of a folder.

    They come from processor_config.json (video_processor) or video_preprocessor_config.json.
    Without either, geometry and normalisation are those of images, and limits are the video
    defaults.
    """
    path, entries = _entries(folder, "video_processor", "video_preprocessor_config.json")
    if entries != Preprocessor():
        _check_family(path, entries, entries.video_processor_type)
        return _options(VideoOptions, path, _values(path, entries, _NAMES | _VIDEO_NAMES), folder)
    path, entries = _entries(folder, "image_processor", "preprocessor_config.json")
    values = _values(path, entries, _NAMES)
    return _options(
        VideoOptions,
        path,
        {k: v for k, v in values.items() if k not in ("min_pixels", "max_pixels")},
        folder,
    )


def _entries(folder: Path, section: str, file: str) -> tuple[Path, Preprocessor]:
    nested = getattr(read_json(folder / "processor_config.json", ProcessorConfig), section)
    path = folder / ("processor_config.json" if nested else file)
    return path, nested or read_json(path, Preprocessor)


def _check_family(path: Path, entries: Preprocessor, family: str | None) -> None:
    if family and not family.startswith(("Qwen2VL", "Qwen2_5_VL", "Qwen2_VL")):
        raise InfiniteVLError(
            f"{path} is for another family of models: {family}",
            "use the preprocessor files of a Qwen2-VL or InfiniteVL checkpoint",
        )
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if getattr(entries, switch) is False:
            raise InfiniteVLError(
                f"{path}: {switch} is false",
                f"set {switch} to true; only fully processed pictures are supported",
            )


def _values(path: Path, entries: Preprocessor, names: dict[str, str]) -> dict[str, Any]:
    """Options given by the file, by their names here."""
    values = {}
    if size := entries.size:
        size = size if isinstance(size, dict) else {"size": size}
        low, high = (
            size.get("shortest_edge", size.get("min_pixels")),
            size.get("longest_edge", size.get("max_pixels")),
        )
        if low is None or high is None:
            raise InfiniteVLError(
                f"{path}: size is {size}",
                "give shortest_edge and longest_edge, the least and the most pixels of a picture",
            )
        values = {"min_pixels": low, "max_pixels": high}
    given = {name: getattr(entries, theirs) for name, theirs in names.items()}
    return values | {name: value for name, value in given.items() if value is not None}


def _options(kind: type[T], path: Path, values: dict[str, Any], folder: Path) -> T:
    vision = read_json(folder / "config.json", _Config).vision_config or _Vision()
    for name, theirs in _GEOMETRY.items():
        wanted = getattr(vision, theirs)
        if wanted is not None and values.setdefault(name, wanted) != wanted:
            raise InfiniteVLError(
                f"{path}: {name} is {values[name]}, but config.json's vision_config has {theirs}"
                f" {wanted}",
                "the files are of two checkpoints: copy both from one",
            )
    try:
        return kind(**values)
    except InfiniteVLError as error:
        name, _, rest = error.culprit.partition(" ")
        raise InfiniteVLError(f"{path}: {_NAMES.get(name, name)} {rest}", error.cure) from error


def override(options: Options, values: dict, where: str) -> Options:
    """Apply a caller's values. Errors name `where`."""
    try:
        return dataclasses.replace(options, **values) if values else options
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from error


def write_pixel_limits(folder: Path, limits: dict[str, int]) -> None:
    """Change the image size limits of a folder.

    Args:
      limits: min_pixels, max_pixels or both.

    Raises:
      InfiniteVLError: the settings or the limits are invalid.
    """
    image_options(folder)  # raises for settings that were invalid before the change
    path, _ = _entries(folder, "image_processor", "preprocessor_config.json")
    whole = read_json(path)
    entries = whole if path.name == "preprocessor_config.json" else whole["image_processor"]
    if isinstance(size := entries.get("size"), dict):
        edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        size |= {edges[n] if edges[n] in size else n: value for n, value in limits.items()}
    entries |= limits
    path.write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    image_options(folder)
