"""Pictures that show no scene, though each comes close to one: what the judge must refuse.

Each kind takes a sampled scene and spoils it in one way. The set is fixed by its seed, so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from metamorph.microworld.scenes import CELL_SIZE, COLOURS, IMAGE_SIZE, SHAPES, Scene, SceneObject, coverage, render, window_of
from metamorph.microworld.world import SceneRules, choose, sample_scene

# Neighbours on the palette whose middle is neither: (222, 44, 44) and (246, 138, 26) make a vermilion, and so on.
_NEIGHBOURS = (
    ("red", "orange"),
    ("orange", "yellow"),
    ("yellow", "green"),
    ("green", "cyan"),
    ("cyan", "blue"),
    ("blue", "purple"),
    ("purple", "pink"),
    ("pink", "red"),
)
_STRANGE_COLOURS = ((121, 85, 58), (139, 105, 20), (100, 96, 92), (160, 160, 160), (70, 70, 74), (128, 128, 0), (0, 96, 100), (110, 20, 40))
_STRANGE_BACKGROUNDS = ((120, 180, 120), (180, 140, 210), (70, 74, 90), (230, 222, 205), (170, 60, 60), (0, 0, 0))

Picture = UInt8[np.ndarray, "64 64 3"]


@dataclass(frozen=True)
class SpoiledPicture:
    """A picture that shows no scene, and what was done to it."""

    kind: str
    image: Picture


def _to_picture(values: Float[np.ndarray, "64 64 3"]) -> Picture:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _half_erased(scene: Scene, rng: np.random.Generator) -> Picture:
    """One half of one object gives way to the background."""
    thing = choose(rng, scene.objects)
    image, bare = render(scene), render(scene.without(thing.cell))
    window = window_of(thing.cell)
    half = [slice(None), slice(None)]
    axis, middle = int(rng.integers(2)), CELL_SIZE // 2
    half[axis] = slice(0, middle) if rng.random() < 0.5 else slice(middle, None)
    image[window][tuple(half)] = bare[window][tuple(half)]
    return image


def _blend(scene: Scene, rng: np.random.Generator) -> Picture:
    """Two scenes shine through each other."""
    other = sample_scene(rng, SceneRules(split=None, use="any"))
    share = rng.uniform(0.4, 0.6)
    return _to_picture(share * render(scene).astype(np.float32) + (1 - share) * render(other))


def _ghost(scene: Scene, rng: np.random.Generator) -> Picture:
    """One object is half transparent."""
    thing = choose(rng, scene.objects)
    return _to_picture((render(scene).astype(np.float32) + render(scene.without(thing.cell))) / 2)


def _between_colours(scene: Scene, rng: np.random.Generator) -> Picture:
    """One object's hue lies in the middle between two of the palette."""
    thing = choose(rng, scene.objects)
    first, second = (render(scene.with_object(replace(thing, colour=colour))).astype(np.float32) for colour in choose(rng, _NEIGHBOURS))
    return _to_picture((first + second) / 2)


def _strange_colour(scene: Scene, rng: np.random.Generator) -> Picture:
    """One object is brown, grey, olive, ..."""
    thing = choose(rng, scene.objects)
    image = render(scene.without(thing.cell)).astype(np.float32)
    alpha, window = coverage(thing)[..., None], window_of(thing.cell)
    image[window] = image[window] * (1 - alpha) + np.array(choose(rng, _STRANGE_COLOURS)) * alpha
    return _to_picture(image)


def _strange_background(scene: Scene, rng: np.random.Generator) -> Picture:
    """The objects stand on a background that is none of the four."""
    image = np.broadcast_to(np.array(choose(rng, _STRANGE_BACKGROUNDS), dtype=np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    whole = render(scene)
    for thing in scene.objects:
        alpha, window = coverage(thing)[..., None], window_of(thing.cell)
        image[window] = image[window] * (1 - alpha) + whole[window] * alpha
    return _to_picture(image)


def _noise(scene: Scene, rng: np.random.Generator) -> Picture:
    """No picture at all: even noise, or noise so strong that nothing is left."""
    if rng.random() < 0.5:
        return rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return _to_picture(render(scene) + rng.normal(0, 150, (IMAGE_SIZE, IMAGE_SIZE, 3)))


def _half_a_cell_off(scene: Scene, rng: np.random.Generator) -> Picture:
    """Everything is moved by half a cell, along one axis or both."""
    steps = choose(rng, ((0, 1), (1, 0), (1, 1)))
    return np.roll(render(scene), tuple(CELL_SIZE // 2 * step for step in steps), axis=(0, 1))


def _off_centre(scene: Scene, rng: np.random.Generator) -> Picture:
    """One small object stands four pixels off its place."""
    thing = choose(rng, scene.objects)
    dx, dy = choose(rng, ((4.0, 0.0), (-4.0, 0.0), (0.0, 4.0), (0.0, -4.0)))
    return render(scene.with_object(replace(thing, size="small", dx=dx, dy=dy)))


def _between_sizes(scene: Scene, rng: np.random.Generator) -> Picture:
    """One object is neither large nor small."""
    thing = choose(rng, scene.objects)
    return render(scene.with_object(replace(thing, size="small", stretch=float(rng.uniform(0.2, 0.3)))))


def _turned(scene: Scene, rng: np.random.Generator) -> Picture:
    """One object is turned by a part of a right angle."""
    thing = replace(choose(rng, scene.objects), shape=choose(rng, ("square", "triangle", "cross", "heart", "moon")), dx=0.0, dy=0.0)
    bare, window = render(scene.without(thing.cell)), window_of(thing.cell)
    part = Image.fromarray(render(scene.with_object(thing))[window])
    fill = tuple(int(value) for value in bare[window][0, 0])
    angle = float(rng.uniform(30, 60)) * (1 if rng.random() < 0.5 else -1)
    bare[window] = np.asarray(part.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill))
    return bare


def _overlapping(scene: Scene, rng: np.random.Generator) -> Picture:
    """A second object of another shape and colour covers half of the first."""
    thing = choose(rng, scene.objects)
    others = [shape for shape in SHAPES if shape != thing.shape]
    other = SceneObject(choose(rng, others), choose(rng, [c for c in COLOURS if c != thing.colour]), thing.size, thing.cell, dx=5.0, dy=3.0)
    image = render(scene).astype(np.float32)
    alpha, window = coverage(other)[..., None], window_of(thing.cell)
    image[window] = image[window] * (1 - alpha) + render(scene.with_object(other))[window] * alpha
    return _to_picture(image)


def _shuffled(scene: Scene, rng: np.random.Generator) -> Picture:
    """The quarters of one object's cell change places across the diagonal."""
    thing = choose(rng, scene.objects)
    image = render(scene)
    image[window_of(thing.cell)] = np.roll(image[window_of(thing.cell)], (CELL_SIZE // 2, CELL_SIZE // 2), axis=(0, 1))
    return image


def _smeared(scene: Scene, rng: np.random.Generator) -> Picture:
    """So blurred that no form is left."""
    return np.asarray(Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(float(rng.uniform(3.0, 5.0)))))


SPOILERS: dict[str, Callable[[Scene, np.random.Generator], Picture]] = {
    "half erased": _half_erased,
    "blend of two scenes": _blend,
    "ghost": _ghost,
    "between two colours": _between_colours,
    "strange colour": _strange_colour,
    "strange background": _strange_background,
    "noise": _noise,
    "half a cell off": _half_a_cell_off,
    "off centre": _off_centre,
    "between two sizes": _between_sizes,
    "turned": _turned,
    "overlapping": _overlapping,
    "shuffled": _shuffled,
    "smeared": _smeared,
}


def spoiled_pictures(per_kind: int = 50, seed: int = 0) -> list[SpoiledPicture]:
    """The fixed set: `per_kind` pictures of each way to spoil one, kinds in the order of SPOILERS."""
    rules = SceneRules(split=None, use="any", glyph_rate=0.05, tiny_rate=0.05)
    pictures = []
    for kind, spoil in SPOILERS.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        pictures.extend(SpoiledPicture(kind, spoil(sample_scene(rng, rules), rng)) for _ in range(per_kind))
    return pictures
