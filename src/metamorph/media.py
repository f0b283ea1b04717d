"""Opening images that nobody vouches for, and the one preprocessing of pixels.

Whatever comes in, what goes out is an RGB picture, upright, of a size within the limits; or a `MediaError` that names the file.
Only PIL is used, so that results are the same on every machine. Colour profiles are ignored.

Axes: h and w pixels.
"""

from __future__ import annotations

import hashlib
import io
import re
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
_SIGNATURES = (  # how files begin
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{12}[\x0c-\x80]\0", "BMP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"P[1-6][\s#]", "PPM"),
    (rb"....ftyp(avif|avis)", "AVIF"),
    (rb"....ftyp(hei[cfmsx]|hev[cx]|mif1|msf1)", "HEIC"),
    (rb"....ftyp", "MP4"),
    (rb"\xff\x0a|....JXL \r\n\x87\n", "JPEG XL"),
    (rb"8BPS", "PSD"),
    (rb"%PDF", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (rb"\0\0\x01\0", "ICO"),
    (rb"PK\x03\x04", "ZIP"),
    (rb"\x1f\x8b", "GZIP"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*)?<svg", "SVG"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "HTML"),
    (rb"version https://git-lfs", "a Git LFS pointer"),
)
_SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".webp": "WEBP",
    ".gif": "GIF",
}
HASH_BYTES = 16


@dataclass(frozen=True)
class ImageLimits:
    """What may be opened: file size, decoded size, and what to do with more than one frame."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 2**26  # 8192 x 8192
    animated: Literal["refuse", "first_frame"] = "refuse"


DEFAULT_LIMITS = ImageLimits()


def open_image(
    source: ImageSource, *, root: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS, at_least: int | None = None
) -> Image.Image:
    """An upright RGB copy of an image from a file, its bytes, or PIL.

    EXIF rotation is applied, CMYK and 16-bit greys are converted, transparency is laid over white. The copy carries no metadata, so that
    opening it again changes nothing.

    Args:
        source: a path (relative to `root`, if given), an encoded file, or a PIL image.
        root: the folder that a path may not leave, be it by `..` or by a link.
        limits: what is refused before it is decoded.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if both sides keep so many pixels. Several times faster for
            large photos; pixels differ slightly from those of the whole image resized.

    Raises:
        MediaError: missing, truncated, of size zero, too large, animated, of an unknown format, or outside the root; `fault` tells apart.
    """
    place = describe_source(source)
    image = _open_header(source, root, limits, place)
    if at_least is not None and image is not source and image.format == "JPEG":
        image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]  # None: the mode stays
    try:
        return _to_rgb(image, limits, place)
    except MediaError:
        raise
    except Exception as error:  # decoders of broken files raise almost anything; all of it means the same
        raise _refusal(
            "image-broken", f"an image that does not decode ({error})", "a whole file is needed", "Fetch it again.", place
        ) from error


def check_header(source: ImageSource, *, root: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """All that `open_image` refuses without decoding; fast, but a file that was cut short passes.

    Raises:
        MediaError: as `open_image`.
    """
    place = describe_source(source)
    _check_frames(_open_header(source, root, limits, place), limits, place)


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
    pixels = np.empty((3, height, width), dtype=np.float32)
    for channel, plane, shift, scale in zip(pixels, resized.split(), mean, std, strict=True):  # each plane stays in the processor's cache
        np.multiply(np.asarray(plane), np.float32(1 / 255), out=channel)
        channel -= np.float32(shift)
        channel /= np.float32(scale)
    return pixels


def detected_format(source: Path | bytes) -> str:
    """What a file is by how it begins, whatever its name says: one of `FORMATS`, another known type ("HEIC", "HTML"), or "unknown".

    Raises:
        MediaError: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                start = file.read(512)
        except (OSError, ValueError) as error:
            raise _unreadable(error, describe_source(source)) from error
    else:
        start = source[:512]
    return next((kind for pattern, kind in _SIGNATURES if re.match(pattern, start, re.DOTALL)), "unknown")


def format_of_name(name: str) -> str | None:
    """The format that a file's name promises; None if it promises none that we know."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def image_hash(source: ImageSource, *, root: Path | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """16 bytes by which the same image is known again under any name: BLAKE2b of the file's bytes, without decoding them.

    An image given by PIL has no file: the hash is then of its size and its pixels as `open_image` makes them, and equals that of no file.

    Raises:
        MediaError: the file cannot be read, is too large, or lies outside the root.
    """
    if isinstance(source, Image.Image):
        image = open_image(source, limits=limits)
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=HASH_BYTES, person=b"pixels")
        digest.update(image.tobytes())
        return digest.digest()
    if isinstance(source, Path):
        place = describe_source(source)
        source = _read(resolve_inside(source, root, place), limits, place)
    elif len(source) > limits.max_bytes:
        raise _too_many_bytes(len(source), limits, describe_source(source))
    return hashlib.blake2b(source, digest_size=HASH_BYTES).digest()


def to_pil(pixels: Float[np.ndarray, "3 h w"]) -> Image.Image:
    """An RGB image from values in 0..1 (what lies outside is clipped).

    Raises:
        MediaError: a value is not a number.
    """
    if missing := int(np.isnan(pixels).sum()):
        raise MediaError(f"{missing} values that are not numbers but values in 0..1 are needed (pixels of {pixels.shape}). Look upstream.")
    return Image.fromarray((pixels.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8))


def _refusal(code: str, found: str, expected: str, remedy: str, place: str) -> MediaError:
    error = MediaError(f"{found} but {expected} ({place}). {remedy}")
    error.fault = (code, found, expected, remedy)
    return error


def _unreadable(error: Exception, place: str) -> MediaError:
    found = f"a file that cannot be read ({getattr(error, 'strerror', None) or error})"
    code = "image-missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "image-unreadable"
    return _refusal(code, found, "an image is needed", "Check the path and the root.", place)


def _too_many_bytes(found: int, limits: ImageLimits, place: str) -> MediaError:
    expected = f"at most {limits.max_bytes} are allowed"
    return _refusal("image-too-large", f"{found} bytes", expected, "Shrink the file or raise max_bytes.", place)


def _read(path: Path, limits: ImageLimits, place: str) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _refusal("image-unreadable", "a path that is no regular file", "an image is needed", "Name a file.", place)
        if status.st_size > limits.max_bytes:
            raise _too_many_bytes(status.st_size, limits, place)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise _unreadable(error, place) from error


def _open_header(source: ImageSource, root: Path | None, limits: ImageLimits, place: str) -> Image.Image:
    if isinstance(source, Path):
        source = _read(resolve_inside(source, root, place), limits, place)
    if isinstance(source, bytes):
        if len(source) > limits.max_bytes:
            raise _too_many_bytes(len(source), limits, place)
        source = _identify(source, place)
    _check_size(source, limits, place)
    return source


def _identify(data: bytes, place: str) -> Image.Image:
    """Read the header only."""
    if not data:
        raise _refusal("image-empty", "0 bytes", "an image is needed", "Fetch the file again.", place)
    Image.init()  # without it PIL knows only some of its formats; does nothing the second time
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found, expected = f"far too many pixels ({error})", "an image of ordinary size is needed"
        raise _refusal("image-bomb", found, expected, "Shrink it.", place) from error
    except Exception as error:  # the same as when decoding
        kind = detected_format(data)
        found = "data that is no readable image" + ("" if kind == "unknown" else f" ({kind})")
        expected, remedy = f"one of {', '.join(FORMATS)} is needed", "Fetch or convert the file."
        raise _refusal("image-broken", found, expected, remedy, place) from error


def _check_size(image: Image.Image, limits: ImageLimits, place: str) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        found = f"an image of {width} x {height}"
        raise _refusal("image-empty", found, "at least 1 x 1 pixel is needed", "Drop the image.", place)
    if width * height > limits.max_pixels:
        found, expected = f"{width} x {height} = {width * height} pixels", f"at most {limits.max_pixels} are allowed"
        raise _refusal("image-bomb", found, expected, "Shrink the image or raise max_pixels.", place)


def _check_frames(image: Image.Image, limits: ImageLimits, place: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO" and limits.animated == "refuse":  # MPO is a photo with a second view beside it
        remedy = "Give its frames as a video (a list of images), or save the one that is meant."
        raise _refusal("image-animated", f"{frames} frames", "1 is needed", remedy, place)


def _to_rgb(image: Image.Image, limits: ImageLimits, place: str) -> Image.Image:
    _check_frames(image, limits, place)
    image.load()
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        found = f"pixels of mode {image.mode} (32 bits)"
        raise _refusal("image-depth", found, "at most 16 bits are understood", "Convert it to 8 bits.", place)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # it would tell of an orientation that is no longer there
    return image
