"""Images: loading, resizing and cutting into patches.

The arithmetic is that of the Qwen2-VL image processor. Sides are resized (Pillow, bicubic) to
multiples of patch size x merge size. Values are scaled to 0..1, normalised and cut into patches in
merge order.
"""

import math
import os
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
from einops import rearrange
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.processing.sources import OTHER, describe, kind_of, open_source

MAX_ASPECT_RATIO = 200
MAX_FILE_PIXELS = 1 << 27  # of a stored image; a decoder then needs less than 3 GB
MAX_FILE_BYTES = 1 << 29  # some decoders read the whole file into memory
MAX_RESIZED_PIXELS = 1 << 26  # of a resized image: 85,000 tokens, 0.8 GB of patches

# Formats whose decoders read one file and start no program (Pillow runs Ghostscript for EPS).
# HEIF needs a plug-in that the caller registers.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "PPM",
    "QOI", "TGA", "ICO",
)  # fmt: skip

# EXIF orientation -> transpose that makes the image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_BAND_PIXELS = 1 << 22  # pixels converted at a time


@dataclass(frozen=True)
class ImageOptions:
    """Image settings. Pixel counts are height x width of the resized image."""

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
        check_counts(
            self,
            {
                "min_pixels": 1 << 24,
                "max_pixels": 1 << 40,
                "patch_size": 64,
                "temporal_patch_size": 8,
                "merge_size": 8,
            },
        )
        # Within these limits float32 holds every normalised value.
        for name, low in (("mean", -1e6), ("std", 1e-6), ("rescale_factor", 0.0)):
            values = getattr(self, name) if name != "rescale_factor" else (self.rescale_factor,) * 3
            if len(values) != 3 or not all(
                is_number(value) and low < value < 1e6 for value in values
            ):
                wanted = "a number" if name == "rescale_factor" else "three numbers"
                raise InfiniteVLError(
                    f"{name} is {shown(getattr(self, name))}",
                    f"give {wanted} above {low:g} and below 1e6",
                )
        if isinstance(self.resample, bool) or self.resample not in list(Image.Resampling):
            raise InfiniteVLError(
                f"resample is {shown(self.resample)}",
                f"give one of Pillow's filters, 0 to {max(Image.Resampling)}",
            )
        if self.min_pixels > self.max_pixels:
            raise InfiniteVLError(
                f"min_pixels {self.min_pixels:,} is above max_pixels {self.max_pixels:,}",
                "set both: the resized picture has to fall between them",
            )

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels (the side of a token)."""
        return self.patch_size * self.merge_size

    @property
    def merge_unit(self) -> int:
        """Patches per token."""
        return self.merge_size**2

    @property
    def normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale [3] and shift [3], f32: a normalised value is byte * scale - shift."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        return (self.rescale_factor / std).astype(np.float32), (mean / std).astype(np.float32)


def check_counts(options: object, most: dict[str, int]) -> None:
    """Raise InfiniteVLError unless each named attribute is an integer from 1 to its limit."""
    for name, limit in most.items():
        value = getattr(options, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | np.integer)
            or not 1 <= value <= limit
        ):
            raise InfiniteVLError(
                f"{name} is {shown(value)}",
                f"it counts pixels, patches or frames: give an integer from 1 to {limit:,}",
            )


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 1_003_520
) -> tuple[int, int]:
    """Size (height, width) in pixels that an image is resized to.

    Sides are rounded to multiples of `factor`, halves to even. Above `max_pixels` both sides shrink
    by the same ratio and round down, but not below `factor`. Below `min_pixels` they grow and round
    up.

    Raises:
      InfiniteVLError: a side is not a positive integer, or the aspect ratio is above 200.
    """
    if any(isinstance(s, bool) or not isinstance(s, int | np.integer) for s in (height, width)):
        raise InfiniteVLError(
            f"a picture of {shown(height)} x {shown(width)} pixels (height x width) is asked for",
            "give both sides as integers",
        )
    if height < 1 or width < 1:
        raise InfiniteVLError(
            f"picture of {height} x {width} pixels (height x width) is empty",
            "give a picture of at least 1 x 1",
        )
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InfiniteVLError(
            f"picture of {height} x {width} pixels (height x width) has an aspect ratio of"
            f" {max(height, width) / min(height, width):.0f}",
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


def sides(size: tuple[int, int] | None, image: Image.Image) -> tuple[int, int]:
    """Requested (height, width) in pixels; None is the image's own size."""
    if size is None:
        return image.height, image.width
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise InfiniteVLError(f"size is {shown(size)}", "give a pair of integers: height, width")
    return size[0], size[1]


def check_array(array: object, name: str, dims: str) -> np.ndarray:
    """Convert to numpy and require uint8 with the axes in `dims`, such as "H, W, 3"."""
    array = np.asarray(array)
    if array.ndim != dims.count(",") + 1 or array.shape[-1] != 3:
        raise InfiniteVLError(
            f"{name}: arrays are [{dims}], channels last",
            "move the axes, drop an alpha channel, repeat a grey one three times; or pass a PIL"
            " image, which is converted to RGB",
        )
    if array.dtype != np.uint8:
        raise InfiniteVLError(
            f"{name}: arrays hold uint8 values 0..255", "scale and round, then .astype(np.uint8)"
        )
    if not array.size:
        raise InfiniteVLError(f"{name} is empty", "give at least one pixel and one frame")
    return array


def load_image(
    source: str | Path | bytes | Image.Image | np.ndarray, name: str | None = None
) -> Image.Image:
    """Load an RGB image from a path, file:// or data: URL, bytes, PIL image or array.

    Arrays are uint8 [H, W, 3]. Files have one of FORMATS and at most MAX_FILE_PIXELS pixels; an
    animation yields its first frame. EXIF orientation is applied, transparency is blended onto
    white, and 16-bit grey is scaled to 8 bits.

    Args:
      name: name of the image, for errors.

    Raises:
      InfiniteVLError: the image cannot be decoded completely.
    """
    name = name or f"image {describe(source)}"
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        with open_source(source, name, "image") as file:
            return _decode(file, name)
    if isinstance(source, Image.Image):
        if source.format not in (None, *FORMATS):
            raise InfiniteVLError(
                f"{name} is an open {source.format} file, which is not among the formats that are"
                " read here",
                "if you trust the file, decode it yourself: pass image.convert('RGB')",
            )
        try:
            return _upright(_to_rgb(source, name), source)
        except InfiniteVLError:
            raise
        except (OSError, ValueError, SyntaxError) as error:  # PIL decodes an open file lazily
            raise InfiniteVLError(
                f"{name} is damaged: {error}", "open it in a viewer; export it again as PNG or JPEG"
            ) from error
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return Image.fromarray(check_array(source, name, "H, W, 3"))
    raise InfiniteVLError(
        f"{name} cannot be an image", "pass a path, bytes, a PIL image or a uint8 array [H, W, 3]"
    )


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode an image file to upright RGB."""
    size = file.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise InfiniteVLError(
            f"{name} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read",
            "shrink it first",
        )
    file.seek(0)
    Image.init()  # registers Pillow's formats
    # Decoders raise all kinds of exceptions for damaged files.
    try:
        with Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
            _check_size(image, name)
            image.load()
            _check_size(image, name)  # an icon's size is known only after loading
            return _upright(_to_rgb(image, name), image)
    except InfiniteVLError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InfiniteVLError(f"{name} is too large: {error}", "shrink it first") from error
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        if kind_of(file.read(400)) == "video":
            raise InfiniteVLError(f"{name} is not a picture but a video", OTHER["video"]) from error
        raise InfiniteVLError(
            f"{name} is not a picture in a format that is read ({', '.join(FORMATS)})",
            "open it in a viewer; export it again as PNG or JPEG",
        ) from error
    except Exception as error:
        raise InfiniteVLError(
            f"{name} is damaged: {error}", "open it in a viewer; export it again as PNG or JPEG"
        ) from error


def _check_size(image: Image.Image, name: str) -> None:
    # The JPEG 2000 decoder needs four bytes per sample, twice as many as the others.
    limit = MAX_FILE_PIXELS // 2 if image.format == "JPEG2000" else MAX_FILE_PIXELS
    if image.width * image.height > limit:
        size = f"{image.width:,} x {image.height:,} pixels"
        raise InfiniteVLError(
            f"{name} is too large: {size}, over the limit of {limit:,}",
            "shrink it first, or open it yourself with PIL, shrink that and pass the PIL image",
        )


def _upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of `source` to `pixels`."""
    try:
        value = source.getexif().get(_ORIENTATION)
    except Exception:  # unreadable EXIF: keep the pixels as they are
        return pixels
    value = value[0] if isinstance(value, tuple | bytes) and value else value
    turn = _UPRIGHT.get(value) if isinstance(value, int) else None
    return pixels if turn is None else pixels.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB in bands of rows, to limit the memory for intermediate copies."""
    if image.mode in ("I", "F"):
        raise InfiniteVLError(
            f"{name} has 32-bit pixels (mode {image.mode})",
            "scale its values to 0..255 and convert it to mode L or RGB",
        )
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    if rows >= image.height:
        return _band_to_rgb(image)
    out = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        out.paste(_band_to_rgb(band), (0, top))
    return out


def _band_to_rgb(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        levels = (grey.astype(np.uint32) // 257).astype(np.uint8)
        return Image.fromarray(
            np.where(grey == clear, np.uint8(255), levels) if isinstance(clear, int) else levels
        ).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def patchify(frames: np.ndarray, options: ImageOptions) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut frames [F, H, W, 3] uint8 into normalised patches.

    H and W must be multiples of `options.factor`. The last frame is repeated until F is a multiple
    of `temporal_patch_size`.

    Returns:
      patches: [t*h*w, 3 * temporal_patch_size * patch_size^2] float32. The order of patches is t,
        merged row, merged column, row in the merge, column in the merge. The order of values is
        channel, frame, row, column.
      grid: (t, h, w) in patches.
    """
    span = options.temporal_patch_size
    steps = -(-len(frames) // span)
    grid = (steps, frames.shape[1] // options.patch_size, frames.shape[2] // options.patch_size)
    out = np.empty((steps, grid[1] * grid[2], 3, span * options.patch_size**2), np.float32)
    # Normalise the 256 values of a byte once per channel, then look pixels up.
    levels = (np.arange(256, dtype=np.float64) * options.rescale_factor).astype(np.float32)  # [256]
    tables = [
        (levels - np.float32(mean)) / np.float32(std)
        for mean, std in zip(options.mean, options.std, strict=True)
    ]
    for step in range(steps):  # one step at a time, to avoid a second copy of a long video
        patches = rearrange(
            frames[np.minimum(np.arange(step * span, (step + 1) * span), len(frames) - 1)],
            "tp (h mh ph) (w mw pw) c -> (h w mh mw) c (tp ph pw)",
            mh=options.merge_size,
            mw=options.merge_size,
            ph=options.patch_size,
            pw=options.patch_size,
        )
        for channel, table in enumerate(tables):
            out[step, :, channel] = table[patches[:, channel]]
    return out.reshape(steps * grid[1] * grid[2], -1), grid


def resize_image(
    image: Image.Image, options: ImageOptions, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize an RGB image to whole tokens.

    Args:
      size: (height, width) to use instead of the image's own size, before rounding and limits.

    Returns:
      [H, W, 3] uint8.
    """
    limits = options.min_pixels, options.max_pixels
    height, width = smart_resize(*sides(size, image), options.factor, *limits)
    if height * width > MAX_RESIZED_PIXELS:
        raise InfiniteVLError(
            f"the picture is resized to {width:,} x {height:,} pixels, over the limit of"
            f" {MAX_RESIZED_PIXELS:,}",
            f"lower max_pixels (now {options.max_pixels:,}) or min_pixels (now"
            f" {options.min_pixels:,})",
        )
    return np.asarray(image.resize((width, height), options.resample))


def process_image(
    image: Image.Image, options: ImageOptions, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """`resize_image`, then `patchify`.

    Returns:
      Patches [n, features] float32 and the grid (1, h, w).
    """
    return patchify(resize_image(image, options, size)[None], options)
