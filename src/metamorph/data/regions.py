"""Pictures for visual thinking: the key region cut out of an image, or an image with its key objects boxed and named.

Boxes are in pixels of the upright image (after EXIF rotation), origin at the top left, right and bottom exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from metamorph.errors import RecordError
from metamorph.media import open_image
from metamorph.messages import ImageSource

PADDING = 0.1
"""By how much of its longer side a key region is widened, on every side."""

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
"""Of boxes, in turn; all dark enough for white letters."""


@dataclass(frozen=True)
class Box:
    """A rectangle: left and top inclusive, right and bottom exclusive."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def enclosing(cls, boxes: Iterable[Box]) -> Box:
        """The smallest box around several.

        Raises:
            RecordError: there are none.
        """
        given = list(boxes)
        if not given:
            raise RecordError("0 boxes but at least 1 is needed (key region). Give the row a box or leave it out.")
        return cls(
            min(box.left for box in given),
            min(box.top for box in given),
            max(box.right for box in given),
            max(box.bottom for box in given),
        )


@dataclass(frozen=True)
class NamedBox:
    """An object: what it is called and where it is."""

    name: str
    box: Box


def crop_region(image: ImageSource, box: Box, *, padding: float = PADDING, place: str = "key region") -> Image.Image:
    """The key region: the box widened on every side by `padding` times its longer side, rounded outward, clipped to the image.

    Raises:
        RecordError: the box is empty, not finite, or lies outside the image.
        MediaError: the image cannot be opened.
    """
    opened = open_image(image)
    _check(box, opened.size, place)
    margin = padding * max(box.right - box.left, box.bottom - box.top)
    left, top = max(0, math.floor(box.left - margin)), max(0, math.floor(box.top - margin))
    right, bottom = min(opened.width, math.ceil(box.right + margin)), min(opened.height, math.ceil(box.bottom + margin))
    return opened.crop((left, top, right, bottom))


def draw_boxes(image: ImageSource, objects: Sequence[NamedBox], *, place: str = "key objects") -> Image.Image:
    """A copy of the image with every object boxed, and named above its box (within it, where there is no room above).

    The same on every machine with the same Pillow: colours go by order, sizes by the image's, and the font is the one in Pillow, which
    knows Latin letters only.

    Raises:
        RecordError: no objects, a blank name, or a box that is empty, not finite, or outside the image.
        MediaError: the image cannot be opened.
    """
    if not objects:
        raise RecordError(f"0 objects but at least 1 is needed to draw ({place}). Give the row an object or leave it out.")
    opened = open_image(image)
    shorter = min(opened.size)
    line, size = max(1, round(shorter / 150)), max(10, round(shorter / 25))
    pen, font = ImageDraw.Draw(opened), ImageFont.load_default(size)
    for number, item in enumerate(objects):
        if not item.name.strip():
            raise RecordError(f"a blank name but a word is needed ({place}, object {number + 1} of {len(objects)}). Name the object.")
        _check(item.box, opened.size, place)
        colour = COLOURS[number % len(COLOURS)]
        left, top = max(0, math.floor(item.box.left)), max(0, math.floor(item.box.top))
        right, bottom = min(opened.width, math.ceil(item.box.right)) - 1, min(opened.height, math.ceil(item.box.bottom)) - 1
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        width, height = math.ceil(pen.textlength(item.name, font)) + 2 * line, math.ceil(sum(font.getmetrics())) + line  # pyright: ignore[reportAttributeAccessIssue]
        x = max(0, min(left, opened.width - width))
        y = top - height if top >= height else top
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        pen.text((x + line, y), item.name, fill="white", font=font)
    return opened


def _check(box: Box, size: tuple[int, int], place: str) -> None:
    sides = (box.left, box.top, box.right, box.bottom)
    if not all(math.isfinite(side) for side in sides) or box.right <= box.left or box.bottom <= box.top:
        raise RecordError(f"box {sides} but left < right and top < bottom are needed ({place}). Is it (left, top, width, height)?")
    width, height = size
    if box.left >= width or box.top >= height or box.right <= 0 or box.bottom <= 0:
        raise RecordError(f"box {sides} but the image is {width} x {height} pixels ({place}). Is the box in pixels of another size?")
