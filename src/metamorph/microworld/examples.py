"""Rows drawn as Examples, and the sources from which training and evaluation take them.

Every example is a pure function of (seed, split, kind, index), so that a run can stop and go on anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from metamorph.messages import Example, ImagePart, Message, Part, TextPart, VideoPart
from metamorph.microworld.rows import KINDS, Picture, Row, RowPart
from metamorph.microworld.scenes import IMAGE_SIZE, crop_cell, render
from metamorph.microworld.text import document
from metamorph.microworld.world import Split, WeightedChoice, generator

# The paper's six kinds (section 5) with more of the rare ones, and text-only rows that keep what text taught.
MIXTURE: Mapping[str, float] = {
    "image_qa": 0.36,
    "generation": 0.26,
    "video_qa": 0.03,
    "frames": 0.10,
    "thinking": 0.08,
    "edit": 0.10,
    "text": 0.07,
}
_SPLIT_SEEDS = {"train": 1, "validation": 2, "test": 3}
_KIND_SEEDS = {kind: number for number, kind in enumerate(sorted([*KINDS, "text"]))}


def draw(picture: Picture) -> Image.Image:
    """The pixels of a picture in a row."""
    pixels = render(picture.scene)
    if picture.crop is not None:
        pixels = crop_cell(pixels, picture.crop)
    return Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels.tobytes())


def _part(part: RowPart) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if isinstance(part, Picture):
        return ImagePart(image=draw(part))
    return VideoPart(frames=tuple(ImagePart(image=draw(picture)) for picture in part), fps=1.0)


def to_messages(row: Row) -> tuple[Message, ...]:
    """The row with its pictures drawn."""
    return tuple(Message(role, tuple(_part(part) for part in parts)) for role, parts in row.turns)  # pyright: ignore[reportArgumentType]


def text_row(rng: np.random.Generator, split: Split) -> Row:
    """A dialogue without pictures, from the language model's own reading."""
    while isinstance(chat := document(rng), str):
        pass
    return Row("text", tuple((role, (said,)) for role, said in chat))


def make_row(kind: str, seed: int, split: Split, index: int) -> Row:
    """Row number `index` of a kind."""
    rng = generator(seed, _SPLIT_SEEDS[split], _KIND_SEEDS[kind], index)
    return text_row(rng, split) if kind == "text" else KINDS[kind](rng, split)


@dataclass(frozen=True)
class MicroworldSource:
    """A source of examples of several kinds in given shares.

    `kinds` maps a kind to its share; index i is an example whose kind is drawn by those shares.
    """

    kinds: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    size: int = 100_000
    seed: int = 0
    split: Split = "train"
    name: str = "microworld"

    def __len__(self) -> int:
        """Number of examples."""
        return self.size

    @cached_property
    def _draw_kind(self) -> WeightedChoice[str]:
        return WeightedChoice(tuple(self.kinds), tuple(self.kinds.values()))

    def row(self, index: int) -> Row:
        """The row behind example `index`."""
        return make_row(self._draw_kind(generator(self.seed, 77, index)), self.seed, self.split, index)

    def __getitem__(self, index: int) -> Example:
        """Example `index`, drawn."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} but the source has {self.size} examples.")
        row = self.row(index)
        return Example(to_messages(row), id=f"{self.split}/{row.kind}/{index}", source=self.name, kind=row.kind)


def training_source(
    kinds: Mapping[str, float] | None = None, size: int = 100_000, seed: int = 0, split: Split = "train", name: str = "microworld"
) -> MicroworldSource:
    """The source that recipes name: the default mixture unless shares are given."""
    return MicroworldSource(dict(kinds or MIXTURE), size, seed, split, name)
