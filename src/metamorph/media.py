"""Opening images that nobody vouches for, and the one preprocessing of pixels.

Whatever comes in, what goes out is an RGB picture, upright, of a size within the limits; or a `MediaError` that names the file.
Only PIL is used, so that results are the same on every machine. Colour profiles are ignored.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from PIL import Image

from metamorph.errors import MediaError
from metamorph.messages import ImageSource, resolve_inside

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that may be opened: those decoded by PIL itself, without starting another program."""

Resample: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageLimits:
    """What may be opened: file size, decoded size, and what to do with more than one frame."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 2**26  # 8192 x 8192
    animated: Literal["refuse", "first_frame"] = "refuse"


DEFAULT_LIMITS = ImageLimits()


def open_image(source: ImageSource, *, root: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB copy of an image from a file, its bytes, or PIL.

    EXIF rotation is applied, CMYK and 16-bit greys are converted, transparency is laid over white.

    Args:
        source: a path (relative to `root`, if given), an encoded file, or a PIL image.
        root: the folder that a path may not leave, be it by `..` or by a link.
        limits: what is refused before it is decoded.

    Raises:
        MediaError: missing, truncated, of size zero, too large, animated, of an unknown format, or outside the root.
    """
    place = describe_source(source)
    if isinstance(source, Path):
        source = _read(resolve_inside(source, root, place), limits, place)
    if isinstance(source, bytes):
        if len(source) > limits.max_bytes:
            raise MediaError(
                f"{len(source)} bytes but at most {limits.max_bytes} are allowed ({place}). Shrink the file or raise max_bytes."
            )
        source = _identify(source, place)
    _check_size(source, limits, place)
    try:
        return _to_rgb(source, limits, place)
    except MediaError:
        raise
    except Exception as error:  # decoders of broken files raise almost anything; all of it means the same
        raise MediaError(f"an image that does not decode ({error}) but a whole file is needed ({place}). Fetch it again.") from error


def describe_source(source: ImageSource) -> str:
    """How an error names an image: its path, or what it was given as."""
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes of image"
    return str(getattr(source, "filename", "") or f"PIL image of {source.width} x {source.height}")


def preprocess(
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resample: Resample = "bicubic",
) -> Float[np.ndarray, "3 h w"]:
    """Pixels as an encoder reads them: resized to `size` (height, width; proportions are not kept), scaled to 0..1, then (x - mean) / std.

    Returns:
        float32 of shape [3 h w].

    Raises:
        MediaError: the image is not RGB; `open_image` makes it so.
    """
    if image.mode != "RGB":
        raise MediaError(f"an image of mode {image.mode} but RGB is needed ({describe_source(image)}). Pass it through open_image.")
    height, width = size
    resized = image if image.size == (width, height) else image.resize((width, height), _RESAMPLING[resample])
    pixels = np.asarray(resized, dtype=np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_pil(pixels: Float[np.ndarray, "3 h w"]) -> Image.Image:
    """An RGB image from values in 0..1 (what lies outside is clipped).

    Raises:
        MediaError: a value is not a number.
    """
    if missing := int(np.isnan(pixels).sum()):
        raise MediaError(f"{missing} values that are not numbers but values in 0..1 are needed (pixels of {pixels.shape}). Look upstream.")
    return Image.fromarray((pixels.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def _read(path: Path, limits: ImageLimits, place: str) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"a path that is no regular file but an image is needed ({place}). Name a file.")
        if status.st_size > limits.max_bytes:
            raise MediaError(f"{status.st_size} bytes but at most {limits.max_bytes} are allowed ({place}). Shrink it or raise max_bytes.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"a file that cannot be read ({reason}) but an image is needed ({place}). Check the path and the root.") from error


def _identify(data: bytes, place: str) -> Image.Image:
    """Read the header only."""
    if not data:
        raise MediaError(f"0 bytes but an image is needed ({place}). Fetch the file again.")
    Image.init()  # without it PIL knows only some of its formats; does nothing the second time
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"far too many pixels ({error}) but an image of ordinary size is needed ({place}). Shrink it.") from error
    except Exception as error:  # the same as when decoding
        known = ", ".join(FORMATS)
        raise MediaError(f"data that is no readable image but one of {known} is needed ({place}). Fetch or convert the file.") from error


def _check_size(image: Image.Image, limits: ImageLimits, place: str) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise MediaError(f"an image of {width} x {height} but at least 1 x 1 pixel is needed ({place}). Drop the image.")
    if width * height > limits.max_pixels:
        found = f"{width} x {height} = {width * height} pixels"
        raise MediaError(f"{found} but at most {limits.max_pixels} are allowed ({place}). Shrink the image or raise max_pixels.")


def _to_rgb(image: Image.Image, limits: ImageLimits, place: str) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO" and limits.animated == "refuse":  # MPO is a photo with a second view beside it
        raise MediaError(f"{frames} frames but 1 is needed ({place}). Give a video as a list of images, or allow the first frame.")
    image.load()
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise MediaError(f"pixels of mode {image.mode} (32 bits) but at most 16 bits are understood ({place}). Convert it to 8 bits.")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
