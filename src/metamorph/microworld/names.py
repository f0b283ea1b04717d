"""Invented names and facts: what a model can know here only from text, and what it may see of it.

64 looks (shape, colour, marking) have names. All are described in the language model's text; in the rows of
visual training each belongs to one of four groups of 16, so that transfer between asking and drawing can be
scored. Facts (emblems, towns) live in text only, and puzzles of one and two hops are built on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from metamorph.microworld.scenes import COLOURS, MARKINGS, SHAPES, SceneObject

Group = Literal["text_only", "asked", "drawn", "both"]
GROUPS: tuple[Group, ...] = ("text_only", "asked", "drawn", "both")

# Colour-shape pairs that no picture of the assistant shows in training: one per shape and one per colour.
HELD_OUT_PAIRS = frozenset((COLOURS[(3 * index + 2) % 8], shape) for index, shape in enumerate(SHAPES))

_NAMES = """
dax wug blicket fep toma zorp miffle gorp lumo tiv sarn quib dobe plim yarg nuft
kelp vosk hixa brunt felo mard sproo gink talo wemp ruzz chiv onda bleem patho jurk
zabu drell mofi twane siggo crult habba niv ortle spag yoma feen gluv dwip kasto rimp
tulver soz banip glarn hesk vundo prax mizz ollop scrad tefu wolm jibb cazo renk flumo
""".split()

COUNTRIES = """
Norland Ostavia Belmora Kyrene Tarvos Mirelle Quenta Sundara Velmark Zephria Ardon Castria
Drumia Elyria Fennor Galdor Havenia Isolde Jorvik Kestria Lorvane Montera Nimbra Orsova
""".split()

TOWNS = """
Abbeck Brimville Corling Dunmoor Eastmere Fallow Grenholt Harbrook Inverley Jasmund Kilmory Larkhill
Medway Newgate Oakham Pelling Quarley Redmarsh Stavely Thornby Ulverton Wexcombe Yarrow Zennor
""".split()


@dataclass(frozen=True)
class NamedLook:
    """An invented name, the look it stands for, and what visual training may do with it."""

    name: str
    shape: str
    colour: str
    marking: str
    group: Group

    @property
    def look(self) -> tuple[str, str, str]:
        """(shape, colour, marking)."""
        return (self.shape, self.colour, self.marking)

    @property
    def asked(self) -> bool:
        """Whether it may stand in a picture that the user shows."""
        return self.group in ("asked", "both")

    @property
    def drawn(self) -> bool:
        """Whether it may stand in a picture that the assistant draws."""
        return self.group in ("drawn", "both")

    def made_as(self, thing: SceneObject) -> SceneObject:
        """`thing` with this look, its size, cell and jitter kept."""
        return SceneObject(self.shape, self.colour, thing.size, thing.cell, self.marking, thing.dx, thing.dy, thing.stretch)


@lru_cache(maxsize=1)
def named_looks() -> tuple[NamedLook, ...]:
    """The 64 named looks. Each group shows every shape twice and every colour twice; no held-out pair is named."""
    rng = np.random.default_rng(20241218)
    looks: list[NamedLook] = []
    taken: set[tuple[str, str, str]] = set()
    for group_index, group in enumerate(GROUPS):
        shapes = [SHAPES[i % 8] for i in range(16)]
        while True:
            colours = [COLOURS[i % 8] for i in rng.permutation(16)]
            markings = [MARKINGS[1 + i % 3] for i in rng.permutation(16)]
            fresh = list(zip(shapes, colours, markings, strict=True))
            allowed = all((colour, shape) not in HELD_OUT_PAIRS for shape, colour, _ in fresh)
            if allowed and len(set(fresh)) == 16 and not taken & set(fresh):
                break
        taken |= set(fresh)
        names = _NAMES[16 * group_index : 16 * group_index + 16]
        looks += [NamedLook(name, *look, group=group) for name, look in zip(names, fresh, strict=True)]
    return tuple(looks)


@lru_cache(maxsize=1)
def by_look() -> dict[tuple[str, str, str], NamedLook]:
    """Look -> its named look."""
    return {named.look: named for named in named_looks()}


@lru_cache(maxsize=1)
def by_name() -> dict[str, NamedLook]:
    """Name -> its named look."""
    return {named.name: named for named in named_looks()}


def in_group(group: Group) -> tuple[NamedLook, ...]:
    """The 16 named looks of a group."""
    return tuple(named for named in named_looks() if named.group == group)


@lru_cache(maxsize=1)
def emblems() -> dict[str, str]:
    """Country -> the name of the thing on its flag; six countries for each group of names."""
    rng = np.random.default_rng(7)
    picks = [str(name) for group in GROUPS for name in rng.permutation([n.name for n in in_group(group)])[:6]]
    return dict(zip(COUNTRIES, (picks[i] for i in rng.permutation(len(picks))), strict=True))


@lru_cache(maxsize=1)
def countries_of_towns() -> dict[str, str]:
    """Town -> its country, one town each."""
    rng = np.random.default_rng(8)
    return dict(zip(TOWNS, (COUNTRIES[i] for i in rng.permutation(len(COUNTRIES))), strict=True))


@dataclass(frozen=True)
class Puzzle:
    """A riddle whose answer is a named look, solvable only with facts from text."""

    text: str
    name: str
    hops: int


@lru_cache(maxsize=1)
def puzzles() -> tuple[Puzzle, ...]:
    """One-hop puzzles (a country's emblem) and two-hop puzzles (the emblem of a town's country)."""
    one = [Puzzle(f"the emblem of {country}", name, 1) for country, name in emblems().items()]
    two = [Puzzle(f"the emblem of the country where {town} lies", emblems()[country], 2) for town, country in countries_of_towns().items()]
    return tuple(one + two)
