"""Questions about a scene with their one right answer, the same for pictures and for pictures told in words.

Each function takes a scene and a generator and gives a `Question`, or None where the scene admits no such
question with one right answer. Several wordings each; answers are short, so that they can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from metamorph.microworld.names import NamedLook, by_look, by_name, emblems
from metamorph.microworld.scenes import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, TINY, Scene, SceneObject
from metamorph.microworld.world import choose, describe, noun_of, place_of, with_article

NUMBERS = ("none", "one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A question of one `type`, its answer, and the cell of the object that it is about (if one)."""

    text: str
    answer: str
    type: str
    cell: int | None = None


def _referring(scene: Scene, rng: np.random.Generator, hidden: str) -> tuple[SceneObject, str] | None:
    """An object and words that single it out without telling its attribute `hidden`."""
    shapes, colours = [thing.shape for thing in scene.objects], [thing.colour for thing in scene.objects]
    looks = list(zip(colours, shapes, strict=True))
    options: list[tuple[SceneObject, str]] = []
    for thing in scene.objects:
        if hidden != "cell":
            options.append((thing, f"the object at the {CELLS[thing.cell]}"))
        if hidden != "shape" and shapes.count(thing.shape) == 1:
            options.append((thing, f"the {noun_of(thing)}"))
        if hidden != "colour" and colours.count(thing.colour) == 1:
            options.append((thing, f"the {thing.colour} object"))
        if hidden not in ("colour", "shape") and looks.count((thing.colour, thing.shape)) == 1:
            options.append((thing, f"the {thing.colour} {noun_of(thing)}"))
    return choose(rng, options) if options else None


def true_statement(scene: Scene, rng: np.random.Generator) -> str | None:
    """A true sentence, such as: the star is red. None where the drawn attribute does not fit."""
    hidden = choose(rng, ("colour", "shape", "size", "marking", "cell"))
    found = _referring(scene, rng, hidden)
    if found is None or (found[0].is_glyph and hidden in ("shape", "marking")):
        return None
    thing, words = found
    value = {"shape": with_article(thing.shape), "cell": place_of(thing)}.get(hidden) or getattr(thing, hidden)
    return f"{words} is {value}"


def ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: What colour is the star?"""
    found = _referring(scene, rng, "colour")
    if found is None:
        return None
    thing, words = found
    return Question(choose(rng, (f"What colour is {words}?", f"Which colour does {words} have?")), thing.colour, "colour", thing.cell)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: What shape is the red object?"""
    found = _referring(scene, rng, "shape")
    if found is None or found[0].is_glyph:
        return None
    thing, words = found
    return Question(choose(rng, (f"What shape is {words}?", f"Which shape does {words} have?")), thing.shape, "shape", thing.cell)


def ask_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: Is the star large or small?"""
    found = _referring(scene, rng, "size")
    if found is None or found[0].size not in SIZES:
        return None
    thing, words = found
    return Question(choose(rng, (f"Is {words} large or small?", f"What size is {words}?")), thing.size, "size", thing.cell)


def ask_marking(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: How is the star marked?"""
    found = _referring(scene, rng, "marking")
    if found is None or found[0].is_glyph or found[0].size == TINY:
        return None
    thing, words = found
    wording = (f"How is {words} marked?", f"Is {words} plain, dotted, eyed or banded?")
    return Question(choose(rng, wording), thing.marking, "marking", thing.cell)


def ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: Where is the red star?"""
    found = _referring(scene, rng, "cell")
    if found is None:
        return None
    thing, words = found
    return Question(choose(rng, (f"Where is {words}?", f"In which corner is {words}?")), CELLS[thing.cell], "place", thing.cell)


def ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: How many objects are there? How many red objects are there?"""
    if rng.random() < 0.5:
        wording = ("How many objects are there?", "How many objects do you see?")
        return Question(choose(rng, wording), NUMBERS[len(scene.objects)], "count")
    colour = choose(rng, [thing.colour for thing in scene.objects]) if rng.random() < 0.75 else choose(rng, COLOURS)
    count = sum(thing.colour == colour for thing in scene.objects)
    wording = (f"How many {colour} objects are there?", f"How many objects are {colour}?")
    return Question(choose(rng, wording), NUMBERS[count], "count")


def ask_existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: Is there a red star? Half of the time with yes as the answer, else with one attribute changed."""
    thing = choose(rng, scene.objects)
    if thing.is_glyph:
        return None
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            colour = choose(rng, [other for other in COLOURS if other != colour])
        else:
            shape = choose(rng, [other for other in SHAPES if other != shape])
    there = any((o.colour, o.shape) == (colour, shape) for o in scene.objects)
    phrase = with_article(f"{colour} {shape}")
    wording = (f"Is there {phrase}?", f"Do you see {phrase}?")
    return Question(choose(rng, wording), "yes" if there else "no", "existence", thing.cell if there else None)


def _relations(first: SceneObject, second: SceneObject) -> dict[str, bool]:
    """Which relations can be asked of two objects, and whether they hold."""
    (row, column), (other_row, other_column) = divmod(first.cell, 2), divmod(second.cell, 2)
    sideways = {"left of": column < other_column, "right of": column > other_column} if column != other_column else {}
    upright = {"above": row < other_row, "below": row > other_row} if row != other_row else {}
    return {**sideways, **upright}


def ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: Is the star left of the circle?"""
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[i] for i in rng.permutation(len(scene.objects))[:2])
    looks = [(thing.colour, thing.shape) for thing in scene.objects]
    if any(looks.count((thing.colour, thing.shape)) > 1 for thing in (first, second)):
        return None
    relations = _relations(first, second)
    relation = choose(rng, list(relations))
    words = [f"the {describe(thing, size=False, marking=False)}" for thing in (first, second)]
    return Question(f"Is {words[0]} {relation} {words[1]}?", "yes" if relations[relation] else "no", "relation", first.cell)


def ask_background(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: What is the background?"""
    wording = ("What is the background?", "On what do the objects stand?", f"Is this on {', '.join(BACKGROUNDS[:3])} or {BACKGROUNDS[3]}?")
    return Question(choose(rng, wording), scene.background, "background")


def ask_glyph(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: Which letter is in the picture?"""
    glyphs = [thing for thing in scene.objects if thing.is_glyph]
    if len(glyphs) != 1:
        return None
    kind = noun_of(glyphs[0]).split()[0]
    return Question(choose(rng, (f"Which {kind} do you see?", f"Which {kind} is there?")), glyphs[0].shape, "glyph", glyphs[0].cell)


def ask_fine_detail(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Such as: What shape is the tiny object?"""
    tiny = [thing for thing in scene.objects if thing.size == TINY]
    if len(tiny) != 1:
        return None
    if rng.random() < 0.5:
        return Question("What shape is the tiny object?", tiny[0].shape, "fine_detail", tiny[0].cell)
    return Question("What colour is the tiny object?", tiny[0].colour, "fine_detail", tiny[0].cell)


def ask_named(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Questions in which an object goes by its invented name."""
    found = [(thing, by_look()[thing.look]) for thing in scene.objects if thing.look in by_look()]
    if not found:
        return None
    thing, named = choose(rng, found)
    other = choose(rng, [n for n in by_name() if n != named.name and by_name()[n].asked])
    options = [
        (f"What is the object at the {CELLS[thing.cell]} called?", named.name),
        (f"Where is the {named.name}?", CELLS[thing.cell]),
        (f"Is the {named.name} large or small?", thing.size),
        (f"Is there {with_article(named.name)}?", "yes"),
        (f"Is there {with_article(other)}?", "yes" if any(t.look == by_name()[other].look for t in scene.objects) else "no"),
    ]
    text, answer = choose(rng, options)
    return Question(text, answer, "named", thing.cell)


def ask_fact(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question that needs a fact known only from text: whose emblem is shown."""
    owners = {name: country for country, name in emblems().items()}
    shown = [(thing, by_look()[thing.look]) for thing in scene.objects if thing.look in by_look()]
    owned = [(thing, owners[named.name]) for thing, named in shown if named.name in owners]
    if len(owned) != 1:
        return None
    wording = ("Which country's emblem do you see?", "Of which country is this the emblem?")
    return Question(choose(rng, wording), owned[0][1], "fact", owned[0][0].cell)


SCORED: Mapping[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "marking": ask_marking,
    "place": ask_place,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
    "background": ask_background,
}
LEARNT_LAST = ("place", "existence", "relation")
"""Types that a model answers last: training asks them twice as often as others, in text and about unnamed pictures."""
EXTRA: Mapping[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "glyph": ask_glyph,
    "fine_detail": ask_fine_detail,
    "named": ask_named,
    "fact": ask_fact,
}


# ---- questions about names and facts, asked without a picture -----------------------------------------------


def ask_about_name(named: NamedLook, rng: np.random.Generator) -> Question:
    """A question about what a name means."""
    the, a = f"the {named.name}", with_article(named.name)
    options = [
        (choose(rng, (f"What colour is {a}?", f"Which colour does {a} have?")), named.colour),
        (choose(rng, (f"What shape is {a}?", f"Which shape does {a} have?")), named.shape),
        (choose(rng, (f"How is {a} marked?", f"What marking does {a} have?")), named.marking),
        (choose(rng, (f"What is {a}?", f"What does {the} look like?")), with_article(f"{named.marking} {named.colour} {named.shape}")),
    ]
    text, answer = choose(rng, options)
    return Question(text, answer, "name_in_text")
