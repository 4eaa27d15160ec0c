"""preprocessor_config.json, video_preprocessor_config.json, processor_config.json and the
geometry of config.json.
"""

import json
import math
from pathlib import Path
from random import Random

import numpy as np

from infinitevl_jax import Processor

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import mutate, read
from . import processors

FULL = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25],
    "image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 256, "merge_size": 2,
    "min_pixels": 64, "patch_size": 2, "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 64, "longest_edge": 256}, "temporal_patch_size": 2,
    "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
VIDEO = {
    **FULL,
    "video_processor_type": "Qwen2VLVideoProcessor",
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
}
FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "config.json",
)
KEYS = (
    *VIDEO,
    "num_frames",
    "total_pixels",
    "crop_size",
    "do_center_crop",
    "image_processor",
    "video_processor",
    "do_pad",
    "patch_size",
)
COUNTS = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")


def write(folder: Path) -> None:
    processors.bytes_only(folder)
    (folder / FILES[0]).write_text(json.dumps(FULL))
    (folder / FILES[1]).write_text(json.dumps(VIDEO))


def make(rng: Random, place: Place) -> Case:
    folder = place.copy("preprocessor", write)
    path = folder / rng.choice(FILES[:2] * 3 + FILES[2:])
    if path.name == "processor_config.json":
        path.write_text(
            json.dumps(
                {
                    "processor_class": "Qwen2_5_VLProcessor",
                    "image_processor": FULL,
                    "video_processor": VIDEO,
                }
            )
        )
    if path.name == "config.json" and rng.random() < 0.5:  # nothing else says how large a patch is
        for name in FILES[:2]:
            (folder / name).write_text(
                json.dumps({"min_pixels": 64, "max_pixels": 256, "patch_size": 2})
            )
    kind = rng.random()
    if kind < 0.06:
        label = mutate_file(rng, path, place.work / "outside")
    elif kind < 0.12:
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    else:
        content = json.loads(path.read_text())
        inner = {"processor_config.json": "image_processor", "config.json": "vision_config"}.get(
            path.name
        )
        focus = [(inner, key) for key in content[inner]] if inner else [(key,) for key in content]
        changed = mutate(rng, content, focus=focus, keys=KEYS)
        path.write_bytes(changed.data)
        label = changed.label
    return Case(
        f"{path.name}: {label}",
        lambda: use(Processor.from_pretrained(folder)),
        lambda found: _check(found, folder),
    )


def use(processor: Processor) -> tuple:
    frames = [processors.picture() for _ in range(4)]
    content = [
        {"type": "image", "image": processors.picture()},
        {"type": "video", "video": frames},
        {"type": "text", "text": "x"},
    ]
    return processor([{"role": "user", "content": content}]), processor.images, processor.videos


def _check(found: tuple, folder: Path) -> str:
    """The files' numbers are the options', and picture and video come out as those options
    have it.
    """
    batch, images, videos = found
    for options, section, file in (
        (images, "image_processor", FILES[0]),
        (videos, "video_processor", FILES[1]),
    ):
        said = _said(folder, section, file)
        names = {"mean": "image_mean", "std": "image_std"} | {
            n: n for n in (*COUNTS, "rescale_factor", "resample")
        }
        if section == "video_processor":
            names |= {n: n for n in ("fps", "min_frames", "max_frames")}
        for ours, theirs in names.items():
            value, have = said.get(theirs), getattr(options, ours)
            if value is None:
                continue
            numbers = value if isinstance(value, list) else [value]
            if any(
                isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n)
                for n in numbers
            ):
                return f"a value that is no number was accepted: {theirs} = {value!r:.60}"
            used = [float(n) for n in (have if isinstance(have, tuple) else [have])]
            if used != [float(n) for n in numbers]:
                return f"the file says something else: {theirs} = {value!r:.60}, used {have!r:.60}"
        if wrong := _impossible(options):
            return wrong
    for pixels, grid, options, count in (
        ("pixel_values", "image_grid_thw", images, 1),
        ("pixel_values_videos", "video_grid_thw", videos, 4),
    ):
        frames = [processors.picture()] * count
        wanted, size = patches(frames, options)
        if not np.isfinite(batch[pixels]).all():
            return f"NaN or infinity in {pixels}"
        if (
            batch[grid].tolist() != [size]
            or batch[pixels].shape != wanted.shape
            or not np.allclose(batch[pixels], wanted, rtol=1e-5, atol=1e-5)
        ):
            return f"other patches in {pixels}: grid {batch[grid].tolist()} for {size}"
    return ""


def _impossible(options) -> str:
    if (
        any(not 0 < s < math.inf for s in options.std)
        or len(options.mean) != 3
        or len(options.std) != 3
    ):
        return f"a scale that is no scale was accepted: {options.std}"
    if (
        any(getattr(options, name) < 1 for name in COUNTS)
        or not 0 < options.rescale_factor < math.inf
    ):
        return f"an impossible size was accepted: {options}"
    return ""


def _said(folder: Path, section: str, file: str) -> dict:
    """What the files say for pictures or videos."""
    nested = read(folder / "processor_config.json").get(section)
    said = dict(nested if isinstance(nested, dict) else read(folder / file))
    size = said.get("size")
    if isinstance(size, dict):
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if said.get(ours) is None:
                said[ours] = size.get(theirs)
    return said


def patches(frames: list, options) -> tuple[np.ndarray, list[int]]:
    """Patches of pictures of one size and their grid, by the formula of the paper's processor.

    Small and slow.
    """
    side, unit = options.patch_size * options.merge_size, options.merge_size
    least, most = options.min_pixels, options.max_pixels
    if getattr(options, "total_pixels", None):
        share = options.total_pixels / len(frames) * options.temporal_patch_size
        most = int(max(min(most, share), least * 1.05))
    width, height = frames[0].size
    sides = [round(n / side) * side for n in (height, width)]
    if math.prod(sides) > most:
        ratio = math.sqrt(height * width / most)
        sides = [max(side, math.floor(n / ratio / side) * side) for n in (height, width)]
    elif math.prod(sides) < least:
        ratio = math.sqrt(least / (height * width))
        sides = [math.ceil(n * ratio / side) * side for n in (height, width)]
    pixels = np.stack(
        [np.asarray(f.resize((sides[1], sides[0]), options.resample)) for f in frames]
    ).astype(np.float64)
    steps = -(-len(frames) // options.temporal_patch_size)
    while len(pixels) < steps * options.temporal_patch_size:
        pixels = np.concatenate([pixels, pixels[-1:]])
    pixels = (pixels * options.rescale_factor - np.array(options.mean)) / np.array(options.std)
    rows, columns = sides[0] // options.patch_size, sides[1] // options.patch_size
    shape = (
        steps,
        options.temporal_patch_size,
        rows // unit,
        unit,
        options.patch_size,
        columns // unit,
        unit,
        options.patch_size,
        3,
    )
    order = pixels.reshape(shape).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return order.reshape(steps * rows * columns, -1).astype(np.float32), [steps, rows, columns]
