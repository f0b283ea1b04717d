"""The slow, obvious twin of `microworld.scenes.render`: every pixel of a cell, colours last, a canvas of floats."""

from __future__ import annotations

import numpy as np

from metamorph.microworld.scenes import _GLYPH_ROWS, BLACK, CELL_SIZE, COLOUR_RGB, RADIUS, WHITE, Scene, SceneObject, background_pixels


def cell_grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(CELL_SIZE, dtype=np.float32) - (CELL_SIZE - 1) / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _heart(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    scale = 1.72 * r
    px, py = np.abs(x) / scale, 0.58 - y / scale
    round_part = np.hypot(px - 0.25, py - 0.75) - np.sqrt(2) / 4
    along = 0.5 * np.maximum(px + py, 0)
    tip = np.sqrt(np.minimum(px**2 + (py - 1) ** 2, (px - along) ** 2 + (py - along) ** 2)) * np.sign(px - py)
    return np.where(px + py > 1, round_part, tip) * scale


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    outer, inner = 1.12 * r, 0.5 * r
    sector = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    inner_x, inner_y = inner * np.sin(sector), inner * np.cos(sector)
    edge_x, edge_y = inner_x, inner_y - outer
    return ((py - outer) * edge_x - px * edge_y) / np.hypot(edge_x, edge_y)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
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


def _glyph_alpha(glyph: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    bitmap = np.array([[float(bit) for bit in row] for row in _GLYPH_ROWS[glyph].split()])
    padded = np.pad(bitmap, 2)
    pixel = 2 * r / 7
    column, row = x / pixel + 2 + 2, y / pixel + 3 + 2
    column, row = np.clip(column, 0, 7.999), np.clip(row, 0, 9.999)
    left, top = column.astype(int), row.astype(int)
    fx, fy = column - left, row - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return np.clip(((1 - fy) * upper + fy * lower - 0.5) * pixel * 1.2 + 0.5, 0, 1)


def coverage(thing: SceneObject) -> np.ndarray:
    x, y = cell_grid()
    x, y = x - thing.dx, y - thing.dy
    r = RADIUS[thing.size] * (1 + thing.stretch)
    if thing.is_glyph:
        return _glyph_alpha(thing.shape, x, y, r)
    return np.clip(0.5 - signed_distance(thing.shape, x, y, r), 0, 1)


def _marking_coverage(thing: SceneObject) -> np.ndarray:
    x, y = cell_grid()
    r = RADIUS[thing.size] * (1 + thing.stretch)
    off_x, off_y = {"moon": (-0.52, 0.1), "triangle": (0, 0.3), "heart": (0, -0.12)}.get(thing.shape, (0, 0))
    x, y = x - thing.dx - off_x * r, y - thing.dy - off_y * r
    if thing.marking == "banded":
        return np.clip(0.5 - (np.abs(y) - 0.2 * r), 0, 1)
    return np.clip(0.5 - (np.hypot(x, y) - 0.34 * r), 0, 1)


def draw_object(cell: np.ndarray, thing: SceneObject) -> np.ndarray:
    x, y = cell_grid()
    alpha = coverage(thing)[..., None]
    r = RADIUS[thing.size]
    colour = np.array(COLOUR_RGB[thing.colour], dtype=np.float32)
    paint = np.clip(colour * (1.0 - 0.08 * np.clip((y - thing.dy) / r, -1, 1))[..., None], 0, 255)
    if thing.marking != "plain":
        mark = _marking_coverage(thing)[..., None]
        paint = paint * (1 - mark) + np.array(BLACK if thing.marking == "eyed" else WHITE) * mark
    return cell * (1 - alpha) + paint * alpha


def render(scene: Scene) -> np.ndarray:
    canvas = background_pixels(scene.background).copy()
    for thing in scene.objects:
        top, left = CELL_SIZE * (thing.cell // 2), CELL_SIZE * (thing.cell % 2)
        window = (slice(top, top + CELL_SIZE), slice(left, left + CELL_SIZE))
        canvas[window] = draw_object(canvas[window], thing)
    return (canvas + 0.5).astype(np.uint8)
