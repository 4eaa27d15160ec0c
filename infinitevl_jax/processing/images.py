"""Images: from path, bytes, PIL or array to the patches that the vision tower reads.

The arithmetic is that of the published Qwen2-VL image processor: sides become multiples of patch x merge, Pillow's
bicubic filter, values scaled to 0..1 and normalised, then cut into patches in merge order.
"""

import base64
import binascii
import io
import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from infinitevl_jax.errors import InfiniteVLError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageOptions:
    """How an image becomes patches. Pixel counts are those of the resized image, height x width."""

    min_pixels: int = 3136
    max_pixels: int = 1_003_520
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InfiniteVLError(f"{name} is {value!r}", "it counts pixels, patches or frames: give an integer of 1 or more")
        if self.min_pixels > self.max_pixels:
            raise InfiniteVLError(
                f"min_pixels {self.min_pixels:,} is above max_pixels {self.max_pixels:,}",
                "set both: the resized picture has to fall between them",
            )

    @property
    def factor(self) -> int:
        """Sides of a resized picture are multiples of this many pixels (one token's side)."""
        return self.patch_size * self.merge_size

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.merge_size**2


def smart_resize(height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 1_003_520) -> tuple[int, int]:
    """The (height, width) in pixels that a picture is resized to: multiples of `factor`, area within the two limits.

    Halves round to even. Too large: both sides shrink by the same ratio and round down, though never below `factor`; too small: they grow
    and round up. Raises InfiniteVLError for an empty picture or an aspect ratio over 200.
    """
    if height < 1 or width < 1:
        raise InfiniteVLError(f"picture of {height} x {width} pixels (height x width) is empty", "give a picture of at least 1 x 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InfiniteVLError(
            f"picture of {height} x {width} pixels (height x width) has an aspect ratio of {max(height, width) / min(height, width):.0f}",
            f"the model takes at most {MAX_ASPECT_RATIO}: crop it or cut it into several pictures",
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        ratio = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / ratio / factor) * factor)
        new_width = max(factor, math.floor(width / ratio / factor) * factor)
    elif new_height * new_width < min_pixels:
        ratio = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * ratio / factor) * factor
        new_width = math.ceil(width * ratio / factor) * factor
    return new_height, new_width


def describe(source: object) -> str:
    """A few words that let a reader find the culprit: the path, or the kind and size of what was passed."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URI ({len(source):,} characters)"
    if isinstance(source, str | Path):
        text = str(source)
        return repr(text if len(text) <= 160 else text[:80] + "..." + text[-77:])
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes in memory"
    if isinstance(source, Image.Image):
        return f"PIL image {source.width} x {source.height} mode {source.mode}"
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return f"array of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, list | tuple):
        return f"list of {len(source):,} frames"
    return f"an object of type {type(source).__name__}"


def open_bytes(source: str | Path | bytes, name: str, noun: str) -> bytes | Path:
    """A readable, non-empty file's path, or the bytes themselves. Accepts file:// and data: URIs; `noun` is "image" or "video"."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InfiniteVLError(f"{name} has zero bytes", f"pass the whole {noun} file's contents")
        return bytes(source)
    text = str(source)
    if isinstance(source, str):
        if text.startswith("data:"):
            try:
                return open_bytes(base64.b64decode(text.partition(",")[2], validate=True), name, noun)
            except binascii.Error as error:
                raise InfiniteVLError(f"{name} is not valid base64: {error}", f"use data:{noun}/...;base64,<contents>") from error
        if text.startswith(("http://", "https://")):
            raise InfiniteVLError(f"{name} is a web address", "nothing is downloaded here: fetch the file first and pass its path or bytes")
        if text.startswith("file://"):
            text = unquote(urlparse(text).path)
    path = Path(text)
    try:
        if path.is_dir():
            raise InfiniteVLError(f"{name} is a folder", f"pass one {noun} file" + (" (or a list of frames)" if noun == "video" else ""))
        size = path.stat().st_size
        path.open("rb").close()  # may it be read?
    except InfiniteVLError:
        raise
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise InfiniteVLError(f"{name} {reason}", f"check the path (working folder: {Path.cwd()})") from error
    if size == 0:
        raise InfiniteVLError(f"{name} is an empty file (0 bytes)", f"copy or download the {noun} again")
    return path


def check_array(array: object, name: str, dims: str) -> np.ndarray:
    """`array` as numpy, required to be uint8 with the axes that `dims` lists, e.g. "H, W, 3"."""
    array = np.asarray(array)
    if array.ndim != dims.count(",") + 1 or array.shape[-1] != 3:
        raise InfiniteVLError(
            f"{name}: arrays are [{dims}], channels last",
            "move the axes, drop an alpha channel, repeat a grey one three times; or pass a PIL image, which is converted to RGB",
        )
    if array.dtype != np.uint8:
        raise InfiniteVLError(f"{name}: arrays hold uint8 values 0..255", "scale and round, then .astype(np.uint8)")
    if not array.size:
        raise InfiniteVLError(f"{name} is empty", "give at least one pixel and one frame")
    return array


def load_image(source: str | Path | bytes | Image.Image | np.ndarray, name: str | None = None) -> Image.Image:
    """An RGB picture from a path, file:// or data: URI, bytes, PIL image or uint8 array [H, W, 3].

    A camera's EXIF orientation is applied; transparency is laid over white; 16-bit greys are scaled to 8 bits. `name` is how errors call
    the picture. Raises InfiniteVLError for anything that cannot be decoded whole.
    """
    name = name or f"image {describe(source)}"
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        file = open_bytes(source, name, "image")
        # Decoders of damaged bytes raise every kind of exception, so all are caught here and here alone.
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                image.load()
                return _to_rgb(image, name)
        except InfiniteVLError:
            raise
        except Image.DecompressionBombError as error:
            raise InfiniteVLError(
                f"{name} is too large: {error}", "shrink it first, or open it yourself with PIL and pass the PIL image"
            ) from error
        except Exception as error:
            reason = (
                "is not a picture in a format Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else f"is damaged: {error}"
            )
            raise InfiniteVLError(f"{name} {reason}", "open it in a viewer; export it again as PNG or JPEG") from error
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return Image.fromarray(check_array(source, name, "H, W, 3"))
    raise InfiniteVLError(f"{name} cannot be an image", "pass a path, bytes, a PIL image or a uint8 array [H, W, 3]")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:
        raise InfiniteVLError(f"{name} is damaged: {error}", "open it in a viewer; export it again as PNG or JPEG") from error
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InfiniteVLError(f"{name} has 32-bit pixels (mode {image.mode})", "scale its values to 0..255 and convert it to mode L or RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def patchify(frames: np.ndarray, options: ImageOptions) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut frames [F, H, W, 3] uint8 into normalised patches.

    H and W are multiples of `options.factor`; F that is no multiple of `temporal_patch_size` repeats the last frame.
    Returns patches [t*h*w, 3 * temporal_patch_size * patch_size^2] f32 and the grid (t, h, w) in patches. Patches are ordered t, merged
    row, merged column, row inside the merge, column inside the merge; the numbers of a patch channel, frame, row, column.
    """
    steps = -(-len(frames) // options.temporal_patch_size)
    order = np.minimum(np.arange(steps * options.temporal_patch_size), len(frames) - 1)
    patches = rearrange(
        frames[order],
        "(t tp) (h mh ph) (w mw pw) c -> (t h w mh mw) c (tp ph pw)",
        tp=options.temporal_patch_size,
        mh=options.merge_size,
        mw=options.merge_size,
        ph=options.patch_size,
        pw=options.patch_size,
    )
    # A byte has 256 values: normalise those once per channel, and look the pixels up.
    levels = (np.arange(256, dtype=np.float64) * options.rescale_factor).astype(np.float32)  # [256]
    out = np.empty(patches.shape, np.float32)
    for channel, (mean, std) in enumerate(zip(options.mean, options.std, strict=True)):
        table = (levels - np.float32(mean)) / np.float32(std)  # [256]
        out[:, channel] = table[patches[:, channel]]
    grid = (steps, frames.shape[1] // options.patch_size, frames.shape[2] // options.patch_size)
    return out.reshape(len(out), -1), grid


def process_image(
    image: Image.Image, options: ImageOptions, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An RGB picture's patches [n, features] f32 and grid (1, h, w). `size` (height, width) asks for other sides than the picture's own
    before rounding and limits."""
    height, width = smart_resize(*(size or (image.height, image.width)), options.factor, options.min_pixels, options.max_pixels)
    pixels = np.asarray(image.resize((width, height), options.resample))  # [H, W, 3]
    return patchify(pixels[None], options)
