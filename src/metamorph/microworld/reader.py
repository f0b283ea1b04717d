"""The judge: what a picture shows, read from its pixels alone.

Classical image analysis, no learned part, and it never sees a caption. The background is told from the borders of
the cells; each cell is then compared with every object that the microworld can draw (analysis by synthesis), the best
few are drawn again with fitted jitter, and the best is believed only if what remains is small, its colour lies on the
palette, and the runner-up explains the pixels clearly worse. Anything else is "unreadable": garbage is never rounded
into a right answer.

How a cell is compared and drawn again is in synthesis.py. Axes: c cells, p pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from metamorph.errors import MediaError
from metamorph.microworld.scenes import BACKGROUNDS, CELL_SIZE, IMAGE_SIZE, Scene, SceneObject, background_pixels
from metamorph.microworld.synthesis import PLANES, SMOOTHING, Fit, best_candidates, colour_error, features, fit, largest_form, rank

CROP_BLUR = 0.5  # pixels; what enlarging by two (bilinear) and averaging back has already blurred

# Tolerances in levels (0..255), set on the rendered, degraded and spoiled sets of tests/unit/test_reader.py.
MAX_SHIFT = 14.0  # of the whole picture, per channel
MAX_BACKGROUND_DISTANCE = 25.0  # median over the borders, after the shift
MAX_FORM = 25.0  # largest coherent remainder anywhere in a cell
MAX_COLOUR_ERROR = 33.0  # of an object's paint against the palette
COLOUR_WEIGHTS = (1.0, 2.0, 2.0)  # of the error in luma and chroma: hue counts for more here than where forms are compared
MIN_MARGIN = 0.03  # the runner-up's remaining energy over the best's, minus 1

State = Literal["empty", "object", "unreadable"]
Picture = UInt8[np.ndarray, "64 64 3"] | Image.Image


@dataclass(frozen=True)
class CellReading:
    """What one cell shows.

    `residual` is the largest coherent difference (levels) between the cell and its best explanation; `margin` says by
    how much more energy the runner-up leaves over (0 = a tie). `reason` is empty unless the cell is unreadable.
    """

    state: State
    thing: SceneObject | None = None
    residual: float = 0.0
    margin: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `scene` is None if any part is unreadable; `cells` then still hold what could be read."""

    scene: Scene | None
    background: str | None
    cells: tuple[CellReading, ...]
    reason: str = ""


@dataclass(frozen=True)
class CropReading:
    """What an enlarged cell shows. The cell's place is not visible, so `cell.thing.cell` is always 0."""

    cell: CellReading
    background: str | None


@lru_cache(maxsize=1)
def _backdrops() -> Float[np.ndarray, "4 4 32 32 3"]:
    """Cells of the bare backgrounds [background, cell, ...]."""
    return np.stack([_split(background_pixels(name)) for name in BACKGROUNDS])


def _split(image: np.ndarray) -> Float[np.ndarray, "4 32 32 3"]:
    """The four cells of a picture in reading order."""
    grid = image.astype(np.float32).reshape(2, CELL_SIZE, 2, CELL_SIZE, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(4, CELL_SIZE, CELL_SIZE, 3)


@lru_cache(maxsize=1)
def _border() -> np.ndarray:
    """Indices of the pixels of a cell that lie on its outermost two rings, [p]."""
    inside = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
    inside[2:-2, 2:-2] = True
    return np.flatnonzero(~inside)


def _pixels(image: Picture) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture as an array.

    Raises:
        MediaError: it is not 64 x 64.
    """
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise MediaError(
            f"the picture has shape {array.shape} but the judge reads {(IMAGE_SIZE, IMAGE_SIZE, 3)} (height, width, RGB). Resize it."
        )
    return array


def _median(values: Float[np.ndarray, "values columns"]) -> Float[np.ndarray, "columns"]:
    """Upper median along the first axis; several times faster than np.median."""
    middle = len(values) // 2
    return np.partition(values, middle, axis=0)[middle]


def _match_background(cells: np.ndarray, backdrops: np.ndarray) -> tuple[int, np.ndarray, float]:
    """Which of the backdrops [candidates c 32 32 3] the borders of the cells [c 32 32 3] show.

    Returns:
        The index of the closest, the shift of the whole picture against it per channel, and the median distance left.
    """
    border = _border()
    seen = cells.reshape(len(cells), -1, 3)[:, border].reshape(-1, 3)
    bare = backdrops.reshape(len(backdrops), len(cells), -1, 3)[:, :, border].reshape(len(backdrops), -1, 3)
    best = int(np.argmin(_median(np.abs(seen - bare).max(-1).T)))
    difference = seen - bare[best]
    shift = _median(difference)
    return best, shift, float(_median(np.abs(difference - shift).max(1, keepdims=True))[0])


def _judge(fits: list[Fit], cell: int) -> CellReading:
    """Believe the best of the fits, sorted, or say why not."""
    best, second = fits[0], fits[1]
    margin = second.energy / max(best.energy, 1.0) - 1
    error, explained = colour_error(best)
    form = largest_form(best.remainder - explained)
    off = float(np.linalg.norm(error * COLOUR_WEIGHTS))
    if off > MAX_COLOUR_ERROR:
        reason = f"a colour {off:.0f} levels off the palette but at most {MAX_COLOUR_ERROR:.0f} is believed"
    elif form > MAX_FORM:
        reason = f"a form {form:.0f} levels off the closest object but at most {MAX_FORM:.0f} is believed"
    elif best.at_limit:
        reason = "an object off its place, or between two sizes"
    elif margin < MIN_MARGIN:
        reason = f"{best.thing.attributes[:4]} and {second.thing.attributes[:4]} explain it equally well (margin {margin:.2f})"
    else:
        return CellReading("object", replace(best.thing, cell=cell), form, margin)
    return CellReading("unreadable", None, form, margin, reason)


def _read_cells(
    cells: Float[np.ndarray, "c 32 32 3"], bare: Float[np.ndarray, "c 32 32 3"], sigma: float = SMOOTHING
) -> tuple[CellReading, ...]:
    """Read cells, freed of the picture's shift, against the bare backdrop of each; `sigma` is the blur they still need."""
    seen = features(cells, sigma)
    difference = seen - features(bare)
    forms = [largest_form(one) for one in difference]
    readings = [CellReading("empty", residual=form) for form in forms]
    filled = [index for index, form in enumerate(forms) if form > MAX_FORM]
    if not filled:
        return tuple(readings)
    energies = rank(difference[filled], bare[filled].mean((1, 2)) @ PLANES)
    for row, index in enumerate(filled):
        chosen = best_candidates(energies[row], float((difference[index] ** 2).sum()))
        fits = sorted((fit(one, seen[index], bare[index], steps=1) for one in chosen), key=lambda one: one.energy)
        if fits[1].energy < 2 * fits[0].energy:
            fits[:2] = sorted((fit(one.candidate, seen[index], bare[index], steps=3) for one in fits[:2]), key=lambda one: one.energy)
        readings[index] = _judge(fits, index)
    return tuple(readings)


def read_scene(image: Picture) -> Reading:
    """Read a picture.

    Raises:
        MediaError: it is not 64 x 64.
    """
    cells = _split(_pixels(image))
    which, shift, distance = _match_background(cells, _backdrops())
    worst = float(np.abs(shift).max())
    if worst > MAX_SHIFT or distance > MAX_BACKGROUND_DISTANCE:
        reason = f"the borders of the cells are {worst:.0f} + {distance:.0f} levels off {BACKGROUNDS[which]}, the closest background"
        return Reading(None, None, tuple(CellReading("unreadable", reason="no background") for _ in range(4)), reason)
    readings = _read_cells(cells - shift, _backdrops()[which])
    reasons = [f"cell {index}: {cell.reason}" for index, cell in enumerate(readings) if cell.state == "unreadable"]
    if reasons:
        return Reading(None, BACKGROUNDS[which], readings, "; ".join(reasons))
    things = tuple(cell.thing for cell in readings if cell.thing is not None)
    return Reading(Scene(things, BACKGROUNDS[which]), BACKGROUNDS[which], readings)


def read_many(images: Iterable[Picture]) -> list[Reading]:
    """Read several pictures, in their order."""
    return [read_scene(image) for image in images]


def read_crop(image: Picture) -> CropReading:
    """Read one cell that was enlarged to a whole picture (`scenes.crop_cell`); its place in the scene is unknown.

    Raises:
        MediaError: it is not 64 x 64.
    """
    sigma = float(np.sqrt(SMOOTHING**2 - CROP_BLUR**2))
    small = _pixels(image).astype(np.float32).reshape(CELL_SIZE, 2, CELL_SIZE, 2, 3).mean((1, 3))
    backdrops = _backdrops().reshape(16, 1, CELL_SIZE, CELL_SIZE, 3)
    which, shift, distance = _match_background(small[None], backdrops)
    if float(np.abs(shift).max()) > MAX_SHIFT or distance > MAX_BACKGROUND_DISTANCE:
        return CropReading(CellReading("unreadable", reason="no background"), None)
    return CropReading(_read_cells(small[None] - shift, backdrops[which], sigma)[0], BACKGROUNDS[which // 4])
