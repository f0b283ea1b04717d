"""Scenes of the microworld: what they hold, how they are drawn, how they move.

A scene is one to three objects on a 2 x 2 grid over one of four backgrounds. Objects are large against the
encoder's 8-pixel patches (radius 13 or 8.5 pixels), because smaller ones were measured to be unreadable for a
small vision transformer. Drawing uses signed distance functions, so it is antialiased, exact and fast, and it
is a pure function of the scene: the jitter is part of the object.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

IMAGE_SIZE = 64
CELL_SIZE = 32
CELLS = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("large", "small")
TINY = "tiny"
MARKINGS = ("plain", "dotted", "eyed", "banded")
BACKGROUNDS = ("snow", "sand", "slate", "night")
GLYPHS = ("A", "C", "E", "H", "K", "T", "2", "3", "4", "5", "7", "9")

COLOUR_RGB = {
    "red": (222, 44, 44),
    "orange": (246, 138, 26),
    "yellow": (250, 220, 44),
    "green": (44, 160, 66),
    "cyan": (52, 204, 208),
    "blue": (44, 88, 226),
    "purple": (142, 62, 200),
    "pink": (248, 132, 192),
}
BACKGROUND_RGB = {"snow": (238, 241, 245), "sand": (222, 204, 166), "slate": (112, 120, 132), "night": (28, 30, 54)}
RADIUS = {"large": 13.0, "small": 8.5, TINY: 4.5}
MAX_JITTER = 1.0  # pixels, each axis
MAX_STRETCH = 0.04  # relative change of the radius
WHITE, BLACK = (252, 252, 252), (18, 18, 22)
_PAINT = {name: np.array(rgb, dtype=np.float32)[:, None, None] for name, rgb in COLOUR_RGB.items()}
_WHITE, _BLACK = (np.array(rgb, dtype=np.float64)[:, None, None] for rgb in (WHITE, BLACK))
Motion = Literal["move", "grow", "recolour"]

_GLYPH_ROWS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "7": "11111 00001 00010 00100 00100 01000 01000",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


@dataclass(frozen=True)
class SceneObject:
    """One object. `shape` is one of SHAPES or of GLYPHS; `cell` counts in reading order from 0.

    `dx`, `dy` are pixels off the middle of the cell, `stretch` the relative change of the radius.
    """

    shape: str
    colour: str
    size: str
    cell: int
    marking: str = "plain"
    dx: float = 0.0
    dy: float = 0.0
    stretch: float = 0.0

    @property
    def is_glyph(self) -> bool:
        """Whether the object is a letter or a digit."""
        return self.shape in GLYPHS

    @property
    def look(self) -> tuple[str, str, str]:
        """(shape, colour, marking): what an invented name stands for."""
        return (self.shape, self.colour, self.marking)

    @property
    def attributes(self) -> tuple[str, str, str, str, int]:
        """(shape, colour, marking, size, cell): all that a full caption says of it."""
        return (self.shape, self.colour, self.marking, self.size, self.cell)


@dataclass(frozen=True)
class Scene:
    """One to three objects in different cells, sorted by cell, on a background."""

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.objects]
        if cells != sorted(set(cells)):
            raise ValueError(f"objects stand in cells {cells}, but each cell holds one object and cells ascend.")

    @property
    def attributes(self) -> tuple[str, tuple[tuple[str, str, str, str, int], ...]]:
        """All that is true of the scene but for jitter: the judge's notion of equality."""
        return (self.background, tuple(thing.attributes for thing in self.objects))

    @property
    def signature(self) -> int:
        """A stable hash of the attributes, by which scenes are split into training, validation and test."""
        return int.from_bytes(hashlib.blake2b(repr(self.attributes).encode(), digest_size=8).digest(), "big")

    @property
    def free_cells(self) -> tuple[int, ...]:
        """Cells without an object."""
        return tuple(cell for cell in range(4) if all(thing.cell != cell for thing in self.objects))

    def at(self, cell: int) -> SceneObject | None:
        """The object in a cell, or None."""
        return next((thing for thing in self.objects if thing.cell == cell), None)

    def with_object(self, thing: SceneObject) -> Scene:
        """The scene with `thing` in its cell, in place of what stood there."""
        others = [other for other in self.objects if other.cell != thing.cell]
        return replace(self, objects=tuple(sorted([*others, thing], key=lambda o: o.cell)))

    def without(self, cell: int) -> Scene:
        """The scene without the object in `cell`."""
        return replace(self, objects=tuple(thing for thing in self.objects if thing.cell != cell))


@lru_cache(maxsize=1)
def _cell_axes() -> tuple[Float[np.ndarray, "1 32"], Float[np.ndarray, "32 1"]]:
    """x and y of the pixel centres of one cell, 0 in the middle, in pixels: a row and a column, which broadcast to the cell."""
    axis = np.arange(CELL_SIZE, dtype=np.float32) - (CELL_SIZE - 1) / 2
    return axis[None, :], axis[:, None]


@lru_cache(maxsize=1)
def _cell_grid() -> tuple[Float[np.ndarray, "32 32"], Float[np.ndarray, "32 32"]]:
    """The same for each pixel: numpy's sines of a row that broadcasts could differ from these in the last bit."""
    x, y = np.meshgrid(*_cell_axes())
    return x, y


@lru_cache(maxsize=len(BACKGROUNDS))
def background_pixels(background: str) -> Float[np.ndarray, "64 64 3"]:
    """The bare background, 0..255: a soft vertical gradient with a faint pattern of its own."""
    y, x = np.meshgrid(np.linspace(0, 1, IMAGE_SIZE), np.linspace(0, 1, IMAGE_SIZE), indexing="ij")
    gradient = 1.03 - 0.06 * y
    if background == "sand":
        gradient = gradient + 0.012 * np.sin(40 * y + 5 * np.sin(6 * x))
    elif background == "slate":
        gradient = gradient + 0.02 * np.sin(22 * (x + y))
    elif background == "night":
        gradient = gradient + 0.25 * y
    else:
        gradient = gradient - 0.02 * (y > 0.82 + 0.06 * np.sin(7 * x))
    return np.clip(np.array(BACKGROUND_RGB[background]) * gradient[..., None], 0, 255).astype(np.float32)


def _heart(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance to a heart that fills about the circle of radius r."""
    scale = 1.72 * r
    px, py = np.abs(x) / scale, 0.58 - y / scale
    round_part = np.hypot(px - 0.25, py - 0.75) - np.sqrt(2) / 4
    both = px + py
    along = 0.5 * np.maximum(both, 0)
    tip = np.sqrt(np.minimum(px**2 + (py - 1) ** 2, (px - along) ** 2 + (py - along) ** 2)) * np.sign(px - py)
    return np.where(both > 1, round_part, tip) * scale


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance (near the edge) to a five-pointed star with a point upwards."""
    outer, inner = 1.12 * r, 0.5 * r
    sector = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    inner_x, inner_y = inner * np.sin(sector), inner * np.cos(sector)
    edge_x, edge_y = inner_x, inner_y - outer
    return ((py - outer) * edge_x - px * edge_y) / np.hypot(edge_x, edge_y)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels from the outline of a shape of nominal radius r, negative inside. x and y broadcast."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 0.97 * r
    if shape == "square":
        return np.maximum(ax, ay) - 0.84 * r
    if shape == "triangle":
        down = y - 0.24 * r
        return np.maximum(down - 0.6 * r, 0.866 * ax - 0.5 * down - 0.6 * r)
    if shape == "diamond":
        return (ax / 0.66 + ay - 1.1 * r) * 0.55
    if shape == "star":
        return _star(x, y - 0.06 * r, r)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 0.34 * r, ay - r), np.maximum(ay - 0.34 * r, ax - r))
    if shape == "heart":
        return _heart(x, y, r)
    bite = np.hypot(x - 0.55 * r, y + 0.12 * r) - 0.78 * r
    return np.maximum(np.hypot(x, y) - r, -bite)


@lru_cache(maxsize=len(GLYPHS))
def _glyph_bitmap(glyph: str) -> Float[np.ndarray, "11 9"]:
    """The 5 x 7 pixels of a letter or digit with two empty ones around."""
    return np.pad(np.array([[float(bit) for bit in row] for row in _GLYPH_ROWS[glyph].split()]), 2)


def _glyph_alpha(glyph: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Coverage of a 5 x 7 letter or digit, smoothed, of height 2 r."""
    padded = _glyph_bitmap(glyph)
    pixel = 2 * r / 7
    column, row = x / pixel + 2 + 2, y / pixel + 3 + 2
    column, row = column.clip(0, 7.999), row.clip(0, 9.999)
    left, top = column.astype(int), row.astype(int)
    fx, fy = column - left, row - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return (((1 - fy) * upper + fy * lower - 0.5) * pixel * 1.2 + 0.5).clip(0, 1)


def coverage(thing: SceneObject) -> Float[np.ndarray, "32 32"]:
    """How much of each pixel of its cell the object covers, 0..1."""
    x, y = _cell_grid() if thing.shape == "star" else _cell_axes()
    x, y = x - thing.dx, y - thing.dy
    r = RADIUS[thing.size] * (1 + thing.stretch)
    if thing.is_glyph:
        return _glyph_alpha(thing.shape, x, y, r)
    return (0.5 - signed_distance(thing.shape, x, y, r)).clip(0, 1)


def _marking_coverage(thing: SceneObject) -> Float[np.ndarray, "32 #32"]:
    """Coverage of the marking alone; the caller clips it to the object."""
    x, y = _cell_axes()
    r = RADIUS[thing.size] * (1 + thing.stretch)
    off_x, off_y = {"moon": (-0.52, 0.1), "triangle": (0, 0.3), "heart": (0, -0.12)}.get(thing.shape, (0, 0))
    x, y = x - thing.dx - off_x * r, y - thing.dy - off_y * r
    if thing.marking == "banded":
        return (0.5 - (np.abs(y) - 0.2 * r)).clip(0, 1)
    return (0.5 - (np.hypot(x, y) - 0.34 * r)).clip(0, 1)


def _painted(cell: Float[np.ndarray, "3 32 32"], thing: SceneObject) -> Float[np.ndarray, "3 32 32"]:
    """One object over the pixels of its cell, colours first: numpy is slow where the last axis is short."""
    _, y = _cell_axes()
    alpha = coverage(thing)
    shade = 1.0 - 0.08 * ((y - thing.dy) / RADIUS[thing.size]).clip(-1, 1)
    paint = (_PAINT[thing.colour] * shade).clip(0, 255)
    if thing.marking != "plain":
        mark = _marking_coverage(thing)
        paint = paint * (1 - mark) + (_BLACK if thing.marking == "eyed" else _WHITE) * mark
    return cell * (1 - alpha) + paint * alpha


@lru_cache(maxsize=16)  # in clips, edits and crops most objects stay as they were
def _painted_on(background: str, thing: SceneObject) -> UInt8[np.ndarray, "3 32 32"]:
    """The pixels of an object's cell, colours first."""
    painted = _painted(_bare(background)[1][thing.cell], thing)
    return (painted.astype(np.float32, copy=False) + 0.5).astype(np.uint8)


def draw_object(cell: Float[np.ndarray, "32 32 3"], thing: SceneObject) -> Float[np.ndarray, "32 32 3"]:
    """Paint one object over the pixels of its cell (0..255)."""
    return np.ascontiguousarray(np.moveaxis(_painted(np.moveaxis(cell, -1, 0), thing), 0, -1))


@lru_cache(maxsize=len(BACKGROUNDS))
def _bare(background: str) -> tuple[UInt8[np.ndarray, "64 64 3"], tuple[Float[np.ndarray, "3 32 32"], ...]]:
    """The picture of a bare background, and the exact values of its cells, colours first."""
    exact = background_pixels(background)
    cells = tuple(np.ascontiguousarray(np.moveaxis(exact[window_of(cell)], -1, 0)) for cell in range(len(CELLS)))
    return (exact + 0.5).astype(np.uint8), cells


def window_of(cell: int) -> tuple[slice, slice]:
    """Rows and columns of a cell."""
    top, left = CELL_SIZE * (cell // 2), CELL_SIZE * (cell % 2)
    return slice(top, top + CELL_SIZE), slice(left, left + CELL_SIZE)


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture of a scene, RGB."""
    picture = _bare(scene.background)[0].copy()
    for thing in scene.objects:
        window, painted = picture[window_of(thing.cell)], _painted_on(scene.background, thing)
        for colour in range(3):
            window[..., colour] = painted[colour]
    return picture


def crop_cell(image: UInt8[np.ndarray, "64 64 3"], cell: int) -> UInt8[np.ndarray, "64 64 3"]:
    """One cell of a picture, enlarged to a picture of its own (bilinear)."""
    from PIL import Image

    part = Image.fromarray(image[window_of(cell)])
    return np.asarray(part.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def jittered(thing: SceneObject, rng: np.random.Generator) -> SceneObject:
    """The same object with fresh jitter."""
    return SceneObject(thing.shape, thing.colour, thing.size, thing.cell, thing.marking, *jitter(rng))


def jitter(rng: np.random.Generator) -> tuple[float, float, float]:
    """A random `dx`, `dy` and `stretch`."""
    dx, dy = rng.uniform(-MAX_JITTER, MAX_JITTER, 2).tolist()
    return dx, dy, rng.uniform(-MAX_STRETCH, MAX_STRETCH)
