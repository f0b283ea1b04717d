"""Images that nobody vouches for: understood, or refused with the name of the file."""

import io
import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metamorph.errors import MediaError
from metamorph.media import ImageLimits, check_header, detected_format, image_hash, open_image, preprocess, to_pil


def gradient(width=40, height=30):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=-1).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def mean_difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_ordinary_formats_open(tmp_path, kind):
    path = tmp_path / f"image.{kind.lower()}"
    gradient().save(path, format=kind)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert mean_difference(image, gradient()) < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = gradient()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera would have stored it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, exif=exif))
    assert image.size == upright.size
    assert mean_difference(image, upright) == 0


def test_an_orientation_out_of_range_leaves_the_picture_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 77
    assert mean_difference(open_image(encoded(gradient(), exif=exif)), gradient()) == 0


def test_cmyk_becomes_rgb():
    image = open_image(encoded(gradient().convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert mean_difference(image, gradient()) < 12


def test_sixteen_bit_greys_keep_their_range():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        image = np.asarray(open_image(encoded(Image.fromarray(grey), kind)))
        assert (image == (grey // 257)[..., None]).all()


def test_sixteen_bit_colour_opens():
    rows = b"".join(b"\0" + struct.pack(">12H", *[0, 32768, 65535] * 4) for _ in range(4))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    assert np.asarray(open_image(png))[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused_rather_than_guessed(mode):
    with pytest.raises(MediaError, match=f"mode {mode}"):
        open_image(encoded(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    stored = encoded(image.convert("LA") if mode == "LA" else image) if mode != "P" else encoded(image, "GIF")
    result = open_image(stored)
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "RGBX"])
def test_pil_images_of_any_mode_become_rgb_and_are_not_touched(mode):
    image = gradient().convert(mode)
    result = open_image(image)
    assert result.mode == "RGB"
    assert image.mode == mode
    result.putpixel((0, 0), (1, 2, 3))
    assert open_image(image).getpixel((0, 0)) != (1, 2, 3)


def test_animations_are_refused_or_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(MediaError, match="3 frames but 1 is needed"):
            open_image(data)
        first = open_image(data, limits=ImageLimits(animated="first_frame"))
        assert mean_difference(first, frames[0]) < 3


def test_limits_are_checked_before_decoding(tmp_path):
    path = tmp_path / "wide.png"
    gradient().save(path)
    with pytest.raises(MediaError, match=r"40 x 30 = 1200 pixels but at most 1199 .*wide\.png"):
        open_image(path, limits=ImageLimits(max_pixels=1199))
    size = path.stat().st_size
    with pytest.raises(MediaError, match=rf"{size} bytes but at most {size - 1} .*wide\.png"):
        open_image(path, limits=ImageLimits(max_bytes=size - 1))
    with pytest.raises(MediaError, match="bytes but at most 10"):
        open_image(path.read_bytes(), limits=ImageLimits(max_bytes=10))
    with pytest.raises(MediaError, match="1200 pixels"):
        open_image(gradient(), limits=ImageLimits(max_pixels=1199))
    assert open_image(path, limits=ImageLimits(max_pixels=1200, max_bytes=size)).size == (40, 30)


@pytest.mark.parametrize("side", [9000, 10000, 60000])
def test_a_decompression_bomb_is_refused(side):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    with pytest.raises(MediaError, match="pixels"):
        open_image(png)


def test_missing_and_unreadable_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image at all")
    os.mkfifo(tmp_path / "pipe.png")
    for name, found in [
        ("none.png", "No such file"),
        ("empty.png", "0 bytes"),
        ("text.png", "no readable image"),
        (".", "no regular file"),
        ("pipe.png", "no regular file"),  # and opening it does not hang
    ]:
        with pytest.raises(MediaError, match=found) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(MediaError, match="cannot be read"):
        open_image(Path("a\0b"))
    with pytest.raises(MediaError, match="too long"):
        open_image(tmp_path / ("x" * 5000))


def test_formats_that_start_other_programs_are_refused():
    with pytest.raises(MediaError, match="no readable image"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_an_image_of_size_zero_is_refused():
    with pytest.raises(MediaError, match="0 x 5 but at least 1 x 1"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_or_damaged_files_are_refused_or_read_but_never_crash(tmp_path, kind):
    data = encoded(gradient(), kind)
    rng = random.Random(0)
    for cut in range(1, len(data), max(1, len(data) // 25)):
        try:
            assert open_image(data[:cut]).mode == "RGB"
        except MediaError:
            pass
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except MediaError:
            pass
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="half"):
        open_image(path)


def test_paths_stay_inside_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    gradient().save(root / "in.png")
    gradient().save(tmp_path / "out.png")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    assert open_image(Path("in.png"), root=root).size == (40, 30)
    for path in ("../out.png", str(tmp_path / "out.png"), "link.png"):
        with pytest.raises(MediaError, match="but a path inside"):
            open_image(Path(path), root=root)


def test_preprocess_scales_and_normalises():
    pixels = preprocess(Image.new("RGB", (10, 20), (255, 0, 51)), (6, 4), mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.1))
    assert pixels.shape == (3, 6, 4)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0], [1.0, -2.0, 0.0], atol=1e-6)
    with pytest.raises(MediaError, match="mode L but RGB"):
        preprocess(Image.new("L", (4, 4)), (4, 4), (0.5,) * 3, (0.5,) * 3)


def test_preprocess_agrees_with_the_processor_of_siglip():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(size={"height": 24, "width": 24})(gradient(), return_tensors="pt")["pixel_values"][0]
    ours = preprocess(gradient(), (24, 24), (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert torch.allclose(torch.from_numpy(ours), theirs.float(), atol=1e-6)


def test_to_pil_is_the_inverse_of_scaling():
    image = gradient()
    assert mean_difference(to_pil(preprocess(image, (30, 40), (0.0,) * 3, (1.0,) * 3)), image) == 0
    assert to_pil(np.full((3, 2, 2), 1.7, dtype=np.float32)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(MediaError, match="1 values that are not numbers"):
        to_pil(np.array([[[np.nan]], [[0]], [[0]]]))


def test_an_image_opened_twice_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = gradient().transpose(Image.Transpose.ROTATE_90)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        once = open_image(encoded(stored, kind, exif=exif))
        assert once.size == (40, 30)
        assert mean_difference(open_image(once), once) == 0


def test_cmyk_as_adobe_writes_it_is_not_inverted():
    data = bytearray(encoded(gradient().convert("CMYK"), "JPEG", quality=95))
    assert b"Adobe" in data  # which is what tells that the inks are stored inverted
    assert mean_difference(open_image(bytes(data)), gradient()) < 12
    stored = Image.open(io.BytesIO(data))
    assert stored.mode == "CMYK"
    assert mean_difference(open_image(stored), gradient()) < 12


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_with_transparency_is_laid_over_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    result = open_image(encoded(image, transparency=transparency))
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


def test_half_transparent_pixels_are_mixed_with_white():
    assert open_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)])
def test_preprocess_is_bit_equal_to_the_slow_formula(mean):
    std = (0.26862954, 0.26130258, 0.27577711)
    image = gradient(256, 200)
    plain = (np.asarray(image, dtype=np.float32) * np.float32(1 / 255) - np.float32(mean)) / np.float32(std)
    assert np.array_equal(preprocess(image, (200, 256), mean, std), plain.transpose(2, 0, 1))


def photo(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_a_large_jpeg_may_be_decoded_smaller_within_a_tolerance():
    data = encoded(photo(1536, 1024), "JPEG", quality=92)
    whole, scaled = open_image(data), open_image(data, at_least=2 * 96)
    assert scaled.size == (384, 256)  # 1/4: at 1/8 the shorter side would have 128 pixels
    pixels = [np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), dtype=float) for image in (whole, scaled)]
    difference = np.abs(pixels[0] - pixels[1])
    assert difference.mean() < 1 and difference.max() <= 8
    assert open_image(data, at_least=1000).size == (1536, 1024)
    png = encoded(photo(96, 96))
    assert open_image(png, at_least=8).size == (96, 96)
    given = Image.open(io.BytesIO(data))
    assert open_image(given, at_least=192).size == (1536, 1024) == given.size  # what is not ours is not touched
    with pytest.raises(MediaError, match="1572864 pixels"):
        open_image(data, at_least=192, limits=ImageLimits(max_pixels=10**6))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_a_type_is_told_by_the_content(tmp_path, kind):
    path = tmp_path / "holiday.txt"
    path.write_bytes(encoded(gradient(), kind))
    assert detected_format(path) == detected_format(path.read_bytes()) == kind


def test_types_that_are_no_images_are_told_too(tmp_path):
    for start, kind in [
        (b"", "unknown"),
        (b"hello", "unknown"),
        (b"\n <!DOCTYPE html><p>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\0\0\0 ftypheic", "HEIC"),
        (b"\0\0\0 ftypisom", "MP4"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?><svg>', "SVG"),
    ]:
        assert detected_format(start) == kind
    with pytest.raises(MediaError, match="No such file"):
        detected_format(tmp_path / "none.png")
    with pytest.raises(MediaError, match=r"no readable image \(HTML\)"):
        open_image(b"<html>404</html>")


def test_the_hash_knows_a_file_under_any_name(tmp_path):
    data = encoded(gradient())
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(data)
    assert image_hash(Path("a.png"), root=tmp_path) == image_hash(tmp_path / "b.jpg") == image_hash(data)
    assert len(image_hash(data)) == 16
    pixels = image_hash(gradient())
    assert pixels == image_hash(open_image(data)) != image_hash(data)
    changed = gradient()
    changed.putpixel((3, 3), (1, 2, 3))
    assert len({pixels, image_hash(changed), image_hash(gradient(30, 40)), image_hash(data[:-1])}) == 4
    with pytest.raises(MediaError, match="bytes but at most 10"):
        image_hash(data, limits=ImageLimits(max_bytes=10))
    with pytest.raises(MediaError, match="a path inside"):
        image_hash(Path("../a.png"), root=tmp_path / "sub")


def test_headers_are_checked_without_decoding():
    data = encoded(gradient(), "JPEG")
    check_header(data[:-50])  # cut short, which the header does not tell
    with pytest.raises(MediaError, match="1200 pixels"):
        check_header(data, limits=ImageLimits(max_pixels=1000))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with pytest.raises(MediaError, match="2 frames"):
        check_header(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_a_refusal_survives_the_way_between_processes():
    with pytest.raises(MediaError) as caught:
        open_image(b"")
    back = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  (our own bytes)
    assert str(back) == str(caught.value)
    assert back.fault[:2] == ("image-empty", "0 bytes")
