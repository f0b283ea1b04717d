"""Images per second: a JPEG file's bytes to a normalised tensor of 384 pixels, against what PIL alone takes to decode and resize.

    python benchmarks/images.py

The bare side opens the bytes, sets `draft`, decodes and resizes (bicubic), and stops at 8-bit pixels. Ours does what training does: checks
of size and frames, EXIF, mode, resize with the same filter, and float32 pixels, normalised and channel by channel. Both run on one core, in
turn. Pixels of 512 leave `draft` nothing to do; for a photo of 4,000 pixels our decoding of all pixels and the opt-in `scaled_jpeg` stand
side by side.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
from machine import arguments, rounded, side_by_side, write
from PIL import Image

from metamorph.media import open_image, preprocess

SIDE = 384
MEAN = STD = (0.5, 0.5, 0.5)
GOAL = 0.8


def photo(width: int, height: int, number: int) -> bytes:
    """A JPEG that compresses about as well as a photo: smooth shapes with fine noise."""
    rng = np.random.default_rng(number)
    shapes = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(shapes, dtype=np.int16) + rng.integers(-8, 9, (height, width, 3), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def bare(data: bytes, *, draft: bool) -> np.ndarray:
    """PIL alone."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def ours(data: bytes, at_least: int | None) -> np.ndarray:
    """As the processor prepares an image."""
    return preprocess(open_image(data, at_least=at_least), (SIDE, SIDE), MEAN, STD)


def as_pixels(prepared: np.ndarray) -> np.ndarray:
    """8-bit pixels again, to compare."""
    return (prepared.transpose(1, 2, 0) * 127.5 + 127.5).round().astype(np.int16)


def main() -> None:
    given = arguments(__doc__, "images").parse_args()
    rows = []
    for width, height, number in ((512, 512, 48), (4000, 3000, 2)):
        photos = [photo(width, height, seed) for seed in range(2 if given.quick else number)]
        sides = {
            "bare": lambda photos=photos: [bare(data, draft=True) for data in photos],
            "ours": lambda photos=photos: [ours(data, None) for data in photos],
            "scaled": lambda photos=photos: [ours(data, 2 * SIDE) for data in photos],
        }
        for function in sides.values():
            function()  # memory is mapped, files of the libraries are in the cache
        times, results = side_by_side({name: partial(function) for name, function in sides.items()}, 1 if given.quick else given.repeats)
        assert np.array_equal(as_pixels(results["ours"][0]), bare(photos[0], draft=False)), "both sides must decode the same pixels"
        change = np.abs(as_pixels(results["scaled"][0]) - as_pixels(results["ours"][0]))
        row = {"image": f"{width} x {height}", "kilobytes": rounded(len(photos[0]) / 1000)}
        if width == 512:
            row["goal"] = GOAL
        row["share"] = rounded(times["bare"].wall / times["ours"].wall)
        row["share_cpu"] = rounded(times["bare"].cpu / times["ours"].cpu)
        for name, seconds in times.items():
            row[f"per_second_{name}"] = rounded(len(photos) / seconds.wall)
        rows.append(row | {"scaled_largest_change": int(change.max()), "scaled_mean_change": rounded(float(change.mean()))})
    write(given.out, rows, repeats=1 if given.quick else given.repeats)


if __name__ == "__main__":
    main()
