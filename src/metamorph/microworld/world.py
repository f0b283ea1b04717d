"""Sampling scenes by rule: splits, held-out pairs, named looks, motion, and the words for what is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import numpy as np

from metamorph.errors import ComponentError
from metamorph.microworld.names import HELD_OUT_PAIRS, NamedLook, by_look
from metamorph.microworld.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    GLYPHS,
    MARKINGS,
    SHAPES,
    SIZES,
    TINY,
    Motion,
    Scene,
    SceneObject,
    jitter,
    jittered,
)

Split = Literal["train", "validation", "test"]
Use = Literal["shown", "drawn", "any"]
T = TypeVar("T")
_CLOCKWISE = (0, 1, 3, 2)
MAX_TRIES = 2000  # a test scene is found after 10 on average


@dataclass(frozen=True)
class SceneRules:
    """What a sampled scene may hold.

    `use`: "shown" pictures come from the user, "drawn" ones from the assistant (no held-out pair), "any" is free
    (encoder and decoder images). Named looks appear only through `named`, so that each group's rule holds.
    """

    split: Split | None = "train"
    use: Use = "shown"
    min_objects: int = 1
    max_objects: int = 3
    marking_rate: float = 0.3
    glyph_rate: float = 0.0
    tiny_rate: float = 0.0
    named: tuple[NamedLook, ...] = ()
    held_out_only: bool = False


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to, by a hash of its attributes: 5% validation, 10% test."""
    bucket = scene.signature % 20
    return "validation" if bucket == 0 else "test" if bucket in (1, 2) else "train"


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def generator(*numbers: int) -> np.random.Generator:
    """The generator that numpy seeds with a list of these numbers, made in half the time if each fits in 32 bits."""
    return np.random.default_rng(np.array(numbers, dtype=np.uint32) if max(numbers) < 1 << 32 else numbers)


class WeightedChoice(Generic[T]):
    """Draws one of some options by their shares: what `Generator.choice(options, p=...)` draws, its table made once."""

    def __init__(self, options: Sequence[T], shares: Sequence[float]) -> None:
        weights = np.array(shares, dtype=float)
        self._options = options
        self._until = (weights / weights.sum()).cumsum()
        self._until /= self._until[-1]

    def __call__(self, rng: np.random.Generator) -> T:
        """One of the options."""
        return self._options[int(self._until.searchsorted(rng.random(), side="right"))]


def sample_object(rng: np.random.Generator, cell: int, rules: SceneRules) -> SceneObject:
    """One object that the rules allow in `cell`."""
    if rules.named:
        return jittered(choose(rng, rules.named).made_as(SceneObject("circle", "red", choose(rng, SIZES), cell)), rng)
    while True:
        glyph = rng.random() < rules.glyph_rate
        size = TINY if not glyph and rng.random() < rules.tiny_rate else choose(rng, SIZES)
        marked = not glyph and size != TINY and rng.random() < rules.marking_rate
        shape, colour = choose(rng, GLYPHS if glyph else SHAPES), choose(rng, COLOURS)
        marking = choose(rng, MARKINGS[1:]) if marked else "plain"
        if _look_is_allowed((shape, colour, marking), rules):
            return SceneObject(shape, colour, size, cell, marking, *jitter(rng))


def is_allowed(thing: SceneObject, rules: SceneRules) -> bool:
    """Whether an unnamed object may stand in a picture under the rules."""
    return _look_is_allowed(thing.look, rules)


def _look_is_allowed(look: tuple[str, str, str], rules: SceneRules) -> bool:
    if rules.use == "any":
        return True
    held_out = (look[1], look[0]) in HELD_OUT_PAIRS
    if rules.held_out_only:
        return held_out and look not in by_look()
    return look not in by_look() and not (rules.use == "drawn" and held_out)


def sample_scene(rng: np.random.Generator, rules: SceneRules) -> Scene:
    """A scene under the rules, within their split."""
    while True:
        count = int(rng.integers(rules.min_objects, rules.max_objects + 1))
        cells = sorted(int(cell) for cell in rng.permutation(4)[:count])
        scene = Scene(tuple(sample_object(rng, cell, rules) for cell in cells), choose(rng, BACKGROUNDS))
        if rules.split is None or split_of(scene) == rules.split:
            return scene


def sample_named_scene(rng: np.random.Generator, named: NamedLook, rules: SceneRules) -> Scene:
    """A scene with one named object, the others unnamed.

    Raises:
        ComponentError: the split holds no such scene (a name alone may stand in none of a small split).
    """
    anywhere, naming = replace(rules, split=None), replace(rules, named=(named,))
    for _ in range(MAX_TRIES):
        scene = sample_scene(rng, anywhere)
        cell = choose(rng, [thing.cell for thing in scene.objects])
        scene = scene.with_object(sample_object(rng, cell, naming))
        if rules.split is None or split_of(scene) == rules.split:
            return scene
    raise ComponentError(f"no scene in {MAX_TRIES} tries but one with a {named.name} was expected ({rules}). Allow more objects.")


def rejitter(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene, every object shifted afresh."""
    return replace(scene, objects=tuple(jittered(thing, rng) for thing in scene.objects))


# ---- motion -------------------------------------------------------------------------------------------------


def moved(thing: SceneObject, motion: Motion, step: int) -> SceneObject:
    """The object after `step` steps: a cell further clockwise, a size up (from tiny), or the next colour."""
    if motion == "move":
        return replace(thing, cell=_CLOCKWISE[(_CLOCKWISE.index(thing.cell) + step) % 4])
    if motion == "grow":
        sizes = (TINY, "small", "large")
        return replace(thing, size=sizes[min(sizes.index(thing.size) + step, 2)])
    return replace(thing, colour=COLOURS[(COLOURS.index(thing.colour) + step) % len(COLOURS)])


def sample_clip(rng: np.random.Generator, motion: Motion, rules: SceneRules, frames: int = 3) -> tuple[Scene, ...]:
    """A clip in which one object moves clockwise, grows or changes colour; the others stay as they are."""
    while True:
        scene = sample_scene(rng, replace(rules, max_objects=2, split=None))
        mover = choose(rng, scene.objects)
        if mover.is_glyph or (motion == "grow" and mover.marking != "plain"):
            continue
        start = replace(mover, size=TINY) if motion == "grow" else mover
        rest = scene.without(mover.cell)
        path = [moved(start, motion, step) for step in range(frames)]
        free = all(rest.at(thing.cell) is None for thing in path)
        if free and all(is_allowed(thing, rules) for thing in path):
            clip = tuple(rest.with_object(thing) for thing in path)
            if rules.split is None or split_of(clip[0]) == rules.split:
                return clip


# ---- words --------------------------------------------------------------------------------------------------


def with_article(noun: str) -> str:
    """The noun phrase with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def noun_of(thing: SceneObject) -> str:
    """The word for the shape: "star", "letter A", "digit 7"."""
    return f"{'digit' if thing.shape.isdigit() else 'letter'} {thing.shape}" if thing.is_glyph else thing.shape


def describe(thing: SceneObject, *, size: bool = True, colour: bool = True, marking: bool = True, name: str | None = None) -> str:
    """Words for an object without its article, such as "large dotted red star" or "large dax"."""
    words = [thing.size] if size else []
    if name is not None:
        return " ".join([*words, name])
    if marking and thing.marking != "plain":
        words.append(thing.marking)
    if colour:
        words.append(thing.colour)
    return " ".join([*words, noun_of(thing)])


def place_of(thing: SceneObject) -> str:
    """Words for the cell: "at the top left"."""
    return f"at the {CELLS[thing.cell]}"


def join_words(items: Sequence[str]) -> str:
    """Items as running text: a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _in_order(scene: Scene, rng: np.random.Generator | None) -> list[SceneObject]:
    """The objects as they are told: in reading order, or with `rng` in a random one."""
    return list(scene.objects) if rng is None else [scene.objects[i] for i in rng.permutation(len(scene.objects))]


def caption(scene: Scene, rng: np.random.Generator | None = None, names: dict[int, str] | None = None) -> str:
    """The full caption: every attribute of every object, and the background.

    With `rng` the objects come in a random order. `names` gives invented names by cell.
    """
    names = names or {}
    parts = [f"{with_article(describe(thing, name=names.get(thing.cell)))} {place_of(thing)}" for thing in _in_order(scene, rng)]
    return f"{join_words(parts)} on {scene.background}"


def by_place(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The full caption with each place before its object. With `rng` the objects come in a random order."""
    parts = [f"{place_of(thing)} {with_article(describe(thing))}" for thing in _in_order(scene, rng)]
    return ", ".join([*parts, f"on {scene.background}"])


def in_cells(scene: Scene, words: Callable[[SceneObject], str]) -> list[str]:
    """What stands in each of the four cells, in reading order: the object's words, or "nothing"."""
    return [words(thing) if (thing := scene.at(cell)) else "nothing" for cell in range(len(CELLS))]


def by_corner(scene: Scene) -> str:
    """All four places in reading order, empty ones included."""
    said = in_cells(scene, lambda thing: with_article(describe(thing)))
    return ", ".join([*(f"at the {name} {words}" for name, words in zip(CELLS, said, strict=True)), f"on {scene.background}"])


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves attributes free; it is true of the scene but does not fix it.

    Backgrounds are rarely left out unless they are snow: what goes unsaid in this world has a likeliest value, as in ours.
    """
    parts = []
    for index in rng.permutation(len(scene.objects)):
        thing = scene.objects[index]
        words = describe(thing, size=rng.random() < 0.5, colour=rng.random() < 0.6, marking=thing.marking == "plain" or rng.random() < 0.5)
        parts.append(with_article(words) + (f" {place_of(thing)}" if rng.random() < 0.5 else ""))
    unsaid = rng.random() < (0.8 if scene.background == "snow" else 0.1)
    return join_words(parts) + ("" if unsaid else f" on {scene.background}")


def dense_caption(scene: Scene) -> str:
    """Cell by cell in reading order, empty cells included: the encoder's dense training text."""
    return " ; ".join([*in_cells(scene, describe), f"on {scene.background}"])
