"""What a checkpoint folder says about pictures: sizes, limits, normalisation. Written by many versions of many tools."""

import dataclasses
from pathlib import Path

from infinitevl_jax import reading
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.images import ImageOptions
from infinitevl_jax.processing.video import VideoOptions

# preprocessor files: our name -> theirs, where they differ.
_COMMON = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "merge_size",
    "mean": "image_mean",
    "std": "image_std",
    "rescale_factor": "rescale_factor",
    "resample": "resample",
}
_GEOMETRY = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no such file. Raises InfiniteVLError for anything else."""
    return reading.read_json(path) if path.exists() else {}


def image_options(folder: Path) -> ImageOptions:
    """Image settings: processor_config.json's image_processor, else preprocessor_config.json; what they leave out, config.json's geometry
    and then the published defaults."""
    path, entries = _entries(folder, "image_processor", "preprocessor_config.json")
    return _options(ImageOptions, path, entries, folder, ())


def video_options(folder: Path) -> VideoOptions:
    """Video settings: processor_config.json's video_processor, else video_preprocessor_config.json. Without either, geometry and
    normalisation are the images', the limits the published ones for video (not the images')."""
    path, entries = _entries(folder, "video_processor", "video_preprocessor_config.json")
    if not entries:
        path, entries = _entries(folder, "image_processor", "preprocessor_config.json")
        entries = {key: value for key, value in entries.items() if key not in ("min_pixels", "max_pixels", "size")}
    return _options(VideoOptions, path, entries, folder, ("fps", "min_frames", "max_frames"))


def _entries(folder: Path, section: str, file: str) -> tuple[Path, dict]:
    nested = read_json(folder / "processor_config.json").get(section)
    return (folder / "processor_config.json", nested) if isinstance(nested, dict) else (folder / file, read_json(folder / file))


def _options(kind: type, path: Path, entries: dict, folder: Path, extra: tuple[str, ...]):
    family = str(entries.get(f"{'video' if kind is VideoOptions else 'image'}_processor_type") or "Qwen2VL")
    if not family.startswith(("Qwen2VL", "Qwen2_5_VL", "Qwen2_VL")):
        raise InfiniteVLError(
            f"{path} is for another family of models: {family}", "use the preprocessor files of a Qwen2-VL or InfiniteVL checkpoint"
        )
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if entries.get(switch) is False:
            raise InfiniteVLError(f"{path}: {switch} is false", f"set {switch} to true; only fully processed pictures are supported")
    values = {name: entries[theirs] for name, theirs in _COMMON.items() if entries.get(theirs) is not None}
    values |= {name: entries[name] for name in extra if entries.get(name) is not None}
    size = entries.get("size")
    if isinstance(size, dict) and size:
        low, high = size.get("shortest_edge", size.get("min_pixels")), size.get("longest_edge", size.get("max_pixels"))
        if low is None or high is None:
            raise InfiniteVLError(
                f"{path}: size is {size}", "give shortest_edge and longest_edge, the least and the most pixels of a picture"
            )
        values |= {"min_pixels": low, "max_pixels": high}
    values |= {name: entries[name] for name in ("min_pixels", "max_pixels") if entries.get(name) is not None}
    vision = read_json(folder / "config.json").get("vision_config")
    for name, theirs in _GEOMETRY.items():
        wanted = vision.get(theirs) if isinstance(vision, dict) else None
        if wanted is not None and values.setdefault(name, wanted) != wanted:
            raise InfiniteVLError(
                f"{path}: {name} is {values[name]}, but config.json's vision_config has {theirs} {wanted}",
                "the files are of two checkpoints: copy both from one",
            )
    try:
        return kind(**values)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{path}: {error.culprit}", error.cure) from error
    except (TypeError, ValueError) as error:
        raise InfiniteVLError(f"{path} has a malformed value: {error}", "copy it again from the source checkpoint") from error


def override(options: ImageOptions, values: dict, where: str) -> ImageOptions:
    """`options` with the caller's own values; errors name `where`."""
    try:
        return dataclasses.replace(options, **values) if values else options
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from error
