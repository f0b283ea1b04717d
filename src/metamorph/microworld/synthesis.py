"""Analysis by synthesis: which object the microworld could have drawn into a cell, with which jitter.

A cell is compared as `features`: its luma under a light blur, and its two chroma planes at half the resolution under a
blur of their own. The blur makes the comparison indifferent to noise, JPEG and the softness of a small decoder, but not
to form; chroma is halved because that is all that JPEG keeps of it. Every candidate is ranked at once from masks drawn
beforehand (two matrix products); the best few are then drawn by `scenes.draw_object` itself.

Axes: c cells, p pixels of a plane, g grid of jitter (27), m masks (coverages of outlines and markings), kinds (96).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from jaxtyping import Float

from metamorph.microworld.scenes import (
    BLACK,
    CELL_SIZE,
    COLOUR_RGB,
    COLOURS,
    GLYPHS,
    MARKINGS,
    SHAPES,
    SIZES,
    TINY,
    WHITE,
    SceneObject,
    coverage,
    draw_object,
)

SMOOTHING = 0.7  # pixels; sigma of the blur under which picture and candidate are compared
CHROMA_SMOOTHING = 1.0  # half pixels
STRUCTURE_SMOOTHING = 1.5  # pixels; what remains is blurred by this much more, so that only form is left of it
MAX_OFFSET, MAX_STRETCH = 1.6, 0.085  # jitter beyond the world's own, for decoders that place less exactly

_REFINED = 5  # candidates drawn again per cell
_GRID = tuple(product((-0.7, 0.0, 0.7), (-0.7, 0.0, 0.7), (-0.027, 0.0, 0.027)))  # dx, dy, stretch

# RGB to luma and two chroma planes, weighted so that a level of chroma counts less than a level of luma.
PLANES = (np.array([[0.299, -0.169, 0.5], [0.587, -0.331, -0.419], [0.114, 0.5, -0.081]]) * (1.7, 0.6, 0.6)).astype(np.float32)
_CHANNELS = (slice(0, 1), slice(1, 3))  # luma, chroma


@dataclass(frozen=True)
class Bank:
    """Masks of every outline and marking over a grid of jitter, as `features` sees them.

    Kinds are (shape, size, marking). `masks` (luma, chroma) holds the coverage of outlines and of markings; `cover`
    and `mark` say which row each kind uses (row 0 is empty: no marking). `grams[plane]` are the inner products
    <paint, paint>, <paint, mark>, <mark, mark>, with luma halved.
    """

    kinds: tuple[tuple[str, str, str], ...]
    masks: tuple[Float[np.ndarray, "m 27 1024"], Float[np.ndarray, "m 27 256"]]
    ranks: tuple[Float[np.ndarray, "m 27 256"], Float[np.ndarray, "m 27 256"]]
    cover: np.ndarray
    mark: np.ndarray
    mark_colour: Float[np.ndarray, "kinds 3"]
    grams: Float[np.ndarray, "2 3 kinds 27"]


@lru_cache(maxsize=8)
def _blur_matrix(sigma: float, size: int = CELL_SIZE) -> Float[np.ndarray, "size size"]:
    """A gaussian blur along one axis of a cell; weights are renormalised at the edge."""
    axis = np.arange(size)
    weights = np.exp(-((axis[:, None] - axis) ** 2) / (2 * sigma**2))
    weights[weights < 1e-7] = 0  # denormal numbers would slow every product down tenfold
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=4)
def _operators(sigma: float) -> tuple[Float[np.ndarray, "32 32"], Float[np.ndarray, "16 32"]]:
    """What one axis of a cell goes through in the luma plane, and in the chroma planes (halved, as JPEG does)."""
    halve = np.kron(np.eye(CELL_SIZE // 2, dtype=np.float32), np.full((1, 2), 0.5, dtype=np.float32))
    return _blur_matrix(sigma), 2 * _blur_matrix(CHROMA_SMOOTHING, CELL_SIZE // 2) @ halve


def features(cells: np.ndarray, sigma: float = SMOOTHING) -> np.ndarray:
    """Cells [... 32 32 3] as the judge compares them: [... 1536], linear; blurred luma, then halved, blurred chroma."""
    luma, chroma = _operators(sigma)
    planes = np.ascontiguousarray((cells.reshape(-1, 3) @ PLANES).T).reshape(3, *cells.shape[:-1])
    parts = (luma @ planes[0] @ luma.T, chroma @ planes[1] @ chroma.T, chroma @ planes[2] @ chroma.T)
    return np.concatenate([part.reshape(*cells.shape[:-3], -1) for part in parts], -1)


def _halved(luma: Float[np.ndarray, "*rows 1024"]) -> Float[np.ndarray, "*rows 256"]:
    """Blurred luma at half the resolution, scaled to keep its energy: enough to rank candidates."""
    half = CELL_SIZE // 2
    return 2 * luma.reshape(*luma.shape[:-1], half, 2, half, 2).mean((-3, -1)).reshape(*luma.shape[:-1], -1)


@lru_cache(maxsize=1)
def draw_bank() -> Bank:
    """Draw every mask once: under a second, 12 MB."""
    kinds: list[tuple[str, str, str]] = []
    masks = [np.zeros((len(_GRID), CELL_SIZE, CELL_SIZE))]
    cover, mark = [], []
    blank = np.zeros((CELL_SIZE, CELL_SIZE, 3), dtype=np.float32)
    for shape, size in (*product(SHAPES, (*SIZES, TINY)), *product(GLYPHS, SIZES)):
        things = [SceneObject(shape, "red", size, 0, "plain", *jitter) for jitter in _GRID]
        masks.append(np.stack([coverage(thing) for thing in things]))
        cover_row, mark_rows = len(masks) - 1, {"plain": 0}
        plain = np.stack([draw_object(blank, thing)[..., 2] for thing in things])
        marked = shape in SHAPES and size in SIZES  # the world draws tiny objects and glyphs plain
        for marking in ("dotted", "banded") if marked else ():
            # The white of a marking, seen in the channel in which red is darkest.
            white = np.stack([draw_object(blank, replace(thing, marking=marking))[..., 2] for thing in things])
            masks.append((white - plain) / (WHITE[2] - COLOUR_RGB["red"][2]))
            mark_rows[marking] = len(masks) - 1
        mark_rows["eyed"] = mark_rows.get("dotted", 0)
        for marking in MARKINGS if marked else MARKINGS[:1]:
            kinds.append((shape, size, marking))
            cover.append(cover_row)
            mark.append(mark_rows[marking])
    stack = np.stack(masks).astype(np.float32)
    planes = tuple((operator @ stack @ operator.T).reshape(len(stack), len(_GRID), -1) for operator in _operators(SMOOTHING))
    grams = []
    ranks = (_halved(planes[0]), planes[1])
    for plane in ranks:
        paint, spot = plane[cover] - plane[mark], plane[mark]
        grams.append(np.stack([np.einsum("kgp,kgp->kg", a, b) for a, b in ((paint, paint), (paint, spot), (spot, spot))]))
    colours = np.array([BLACK if marking == "eyed" else WHITE for _, _, marking in kinds], dtype=np.float32)
    return Bank(tuple(kinds), (planes[0], planes[1]), ranks, np.array(cover), np.array(mark), colours @ PLANES, np.stack(grams))


def largest_form(remainder: Float[np.ndarray, "1536"]) -> float:
    """The largest coherent remainder: over places, the norm over planes after a further blur."""
    half = CELL_SIZE // 2
    planes = np.concatenate([_halved(remainder[: CELL_SIZE**2]), remainder[CELL_SIZE**2 :]]).reshape(3, half, half) / 2
    blur = _blur_matrix(STRUCTURE_SMOOTHING / 2, half)
    return float(np.sqrt(((blur @ planes @ blur.T) ** 2).sum(0).max()))


def rank(difference: Float[np.ndarray, "c 1536"], ground: Float[np.ndarray, "c 3"]) -> Float[np.ndarray, "c kinds 27 8"]:
    """Energy that every kind, jitter and colour would leave over, up to a constant per cell.

    The background is taken as even within the cell and paint as unshaded: good enough to choose whom to draw again.
    """
    bank = draw_bank()
    count, size = len(difference), bank.ranks[0].shape[-1]
    planes = np.concatenate([_halved(difference[:, : CELL_SIZE**2]), difference[:, CELL_SIZE**2 :]], -1).reshape(count, 3, size)
    seen = [
        masks.reshape(-1, size) @ planes[:, channels].reshape(-1, size).T for masks, channels in zip(bank.ranks, _CHANNELS, strict=True)
    ]
    shape = (len(bank.kinds), len(_GRID), count)
    energies = []
    for index in range(count):
        ink, spot = _palette() - ground[index], (bank.mark_colour - ground[index])[:, None]
        # The energy is linear in the ink of each plane and in its square: one small product for all colours.
        slopes, squares, rest = [], [], np.zeros(shape[:2], dtype=np.float32)
        for plane, channels in enumerate(_CHANNELS):
            overlap = seen[plane].reshape(-1, len(_GRID), count, channels.stop - channels.start)[:, :, index]
            mark = overlap[bank.mark]
            gram = bank.grams[plane][..., None]
            slopes.append(2 * (gram[1] * spot[..., channels] - overlap[bank.cover] + mark))
            squares.append(gram[0])
            rest += ((gram[2] * spot[..., channels] - 2 * mark) * spot[..., channels]).sum(-1)
        factors = np.concatenate([ink, ink[:, :1] ** 2, (ink[:, 1:] ** 2).sum(1, keepdims=True)], 1)
        energies.append(np.concatenate([*slopes, *squares], -1).reshape(-1, factors.shape[1]) @ factors.T + rest.reshape(-1, 1))
    return np.stack(energies).reshape(count, *shape[:2], len(COLOURS))


@lru_cache(maxsize=1)
def _palette() -> Float[np.ndarray, "8 3"]:
    """The colours in the judge's planes."""
    return np.array([COLOUR_RGB[name] for name in COLOURS], dtype=np.float32) @ PLANES


@dataclass(frozen=True)
class Candidate:
    """A kind in a colour, at the closest place on the grid of jitter."""

    kind: int
    grid: int
    colour: int


def best_candidates(energies: Float[np.ndarray, "kinds 27 8"], floor: float) -> list[Candidate]:
    """The few candidates worth drawing again: at least two, all within twice the best.

    Args:
        energies: what `rank` returned for one cell.
        floor: the energy of the cell itself, which `rank` leaves out.
    """
    grids = energies.argmin(1)
    lowest = energies.min(1) + floor
    order = np.argpartition(lowest, _REFINED, axis=None)[:_REFINED]
    order = order[np.argsort(lowest.ravel()[order], kind="stable")]
    bound = 2 * max(float(lowest.ravel()[order[0]]), 1.0)
    chosen = [index for place, index in enumerate(order) if place < 2 or lowest.ravel()[index] < bound]
    return [Candidate(int(index) // len(COLOURS), int(grids.ravel()[index]), int(index) % len(COLOURS)) for index in chosen]


@dataclass(frozen=True)
class Fit:
    """A candidate drawn with fitted jitter: what remains of the cell's features, and the energy of that."""

    thing: SceneObject
    candidate: Candidate
    remainder: Float[np.ndarray, "1536"]
    energy: float

    @property
    def at_limit(self) -> bool:
        """Whether the jitter would have gone further than is believed."""
        return max(abs(self.thing.dx), abs(self.thing.dy)) >= MAX_OFFSET or abs(self.thing.stretch) >= MAX_STRETCH


def _masks_of(candidate: Candidate, bank: Bank) -> tuple[np.ndarray, np.ndarray]:
    """What paint covers in the luma and in the chroma planes."""
    cover, mark = bank.cover[candidate.kind], bank.mark[candidate.kind]
    return bank.masks[0][cover, candidate.grid] - bank.masks[0][mark, candidate.grid], bank.masks[1][cover, candidate.grid] - bank.masks[1][
        mark, candidate.grid
    ]


def _slopes(candidate: Candidate, bank: Bank, ground: np.ndarray) -> Float[np.ndarray, "3 1536"]:
    """How the features change with dx, dy and stretch, from neighbours on the grid of jitter."""
    ink, spot = _palette()[candidate.colour] - ground, bank.mark_colour[candidate.kind] - ground
    rows = [bank.cover[candidate.kind], bank.mark[candidate.kind]]
    slopes = []
    for stride, step in ((9, 0.7), (3, 0.7), (1, 0.027)):
        place = candidate.grid // stride % 3
        low, high = candidate.grid - min(place, 1) * stride, candidate.grid + min(2 - place, 1) * stride
        width = step * (high - low) / stride
        changes = [(masks[rows, high] - masks[rows, low]) / width for masks in bank.masks]
        parts = ((changes[0], 0), (changes[1], 1), (changes[1], 2))
        slopes.append(np.concatenate([(cover - mark) * ink[plane] + mark * spot[plane] for (cover, mark), plane in parts]))
    return np.stack(slopes)


def fit(candidate: Candidate, seen: Float[np.ndarray, "1536"], bare: Float[np.ndarray, "32 32 3"], steps: int) -> Fit:
    """Draw a candidate over the bare cell, jitter fitted to the features `seen` by some steps of Gauss-Newton."""
    bank = draw_bank()
    shape, size, marking = bank.kinds[candidate.kind]
    slopes = _slopes(candidate, bank, bare.mean((0, 1)) @ PLANES)
    power = slopes @ slopes.T
    inverse = np.linalg.inv(power + 1e-3 * np.diag(np.diag(power)))
    limit = np.array([MAX_OFFSET, MAX_OFFSET, MAX_STRETCH])
    jitter = np.array(_GRID[candidate.grid])
    fits = []
    for _ in range(steps + 1):
        dx, dy, stretch = (float(value) for value in jitter)
        thing = SceneObject(shape, COLOURS[candidate.colour], size, 0, marking, dx, dy, stretch)
        remainder = seen - features(draw_object(bare, thing).astype(np.float32))
        fits.append(Fit(thing, candidate, remainder, float(remainder @ remainder)))
        jitter = np.clip(jitter + inverse @ (slopes @ remainder), -limit, limit)
    return min(fits, key=lambda one: one.energy)


def colour_error(best: Fit) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "1536"]]:
    """How far the paint is off its palette entry, by least squares, and the features of that error."""
    luma, chroma = _masks_of(best.candidate, draw_bank())
    masks, split = (luma, chroma, chroma), (CELL_SIZE**2, CELL_SIZE**2 * 5 // 4)
    error = np.array([float(part @ mask) / float(mask @ mask) for part, mask in zip(np.split(best.remainder, split), masks, strict=True)])
    return error, np.concatenate([mask * one for mask, one in zip(masks, error, strict=True)])
