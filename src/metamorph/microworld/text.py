"""The language model's reading: descriptions, dialogues and facts of the microworld, text only.

All of the model's knowledge of names, emblems, towns and puzzles comes from here. Documents are chats (a list
of role and text) or plain text; both are pure functions of a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Literal

import numpy as np

from metamorph.microworld.exercises import Chat, dialogue, pairs_again_dialogue, pairs_dialogue, repeating_dialogue, things_dialogue
from metamorph.microworld.names import COUNTRIES, by_look, countries_of_towns, emblems, named_looks, puzzles
from metamorph.microworld.questions import LEARNT_LAST, SCORED, Question, ask_about_name, true_statement
from metamorph.microworld.scenes import BACKGROUNDS, CELLS, COLOURS, Scene
from metamorph.microworld.world import (
    SceneRules,
    WeightedChoice,
    by_corner,
    by_place,
    caption,
    choose,
    dense_caption,
    describe,
    in_cells,
    sample_clip,
    sample_object,
    sample_scene,
    with_article,
)

Lesson = Literal["copying", "finding", "reading", "all"]
Shares = tuple[tuple[float, Callable[[np.random.Generator], str | Chat]], ...]
_ASKED_IN_TEXT = tuple(SCORED[type_] for type_ in (*SCORED, *LEARNT_LAST))
ANY = SceneRules(use="any", split=None, glyph_rate=0.04, tiny_rate=0.06)


def names_in(scene: Scene, rng: np.random.Generator, rate: float = 0.7) -> dict[int, str]:
    """Invented names for those objects that have one, each used with probability `rate`."""
    return {t.cell: by_look()[t.look].name for t in scene.objects if t.look in by_look() and rng.random() < rate}


def _scene_with_names(rng: np.random.Generator) -> tuple[Scene, dict[int, str]]:
    """A scene of which about half the objects have invented names."""
    scene = sample_scene(rng, ANY)
    for thing in scene.objects:
        if rng.random() < 0.4:
            scene = scene.with_object(sample_object(rng, thing.cell, replace(ANY, named=named_looks())))
    return scene, names_in(scene, rng)


def plain_description(rng: np.random.Generator) -> str:
    """A caption as plain text."""
    scene, names = _scene_with_names(rng)
    return choose(rng, ("", "There is ", "You see ", "The picture shows ")) + caption(scene, rng, names) + "."


def _said(question: Question) -> Chat:
    return [("user", question.text), ("assistant", question.answer)]


def told(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A scene told in words, as dialogues open: as a caption, or with `rng` in one of three ways."""
    pick = 0.0 if rng is None else rng.random()
    words = caption(scene, rng) if pick < 0.5 else by_place(scene, rng) if pick < 0.85 else dense_caption(scene)
    return f"Think of {words}. "


def _asked(scene: Scene, opening: str, count: int, rng: np.random.Generator) -> Chat:
    """`count` questions about a scene, `opening` before the first: many, so that most of what is learnt is reading."""
    asked: list[tuple[str, str]] = []
    while len(asked) < count:
        question = choose(rng, _ASKED_IN_TEXT)(scene, rng)
        asked += [(question.text, question.answer)] if question is not None else []
    return dialogue(opening, asked)


def told_scene_dialogue(rng: np.random.Generator) -> Chat:
    """A scene told in words, then four to twelve questions about it."""
    scene = sample_scene(rng, ANY)
    return _asked(scene, told(scene, rng), int(rng.integers(4, 13)), rng)


_GRID = (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)  # the cell at each of four places in four rows


def _row_by_row(cells: Sequence[str], between: str) -> str:
    """What stands in the cells, as a grid of words: a picture such as a text can hold, in the order in which visual tokens come."""
    return between.join(cells[cell] for cell in _GRID)


def grid_dialogue(rng: np.random.Generator) -> Chat:
    """A told scene, then one to three of its attributes as grids of words. Drawing is learnt sooner with it (LAB_LOG.md)."""
    scene = sample_scene(rng, ANY)
    attributes = rng.permutation(("colour", "shape", "size", "marking"))[: int(rng.integers(1, 4))]
    asked = [(f"Row by row, {attribute}:", _row_by_row(in_cells(scene, attrgetter(attribute)), " ")) for attribute in attributes]
    return dialogue(told(scene, rng), asked)


def grid_questions_dialogue(rng: np.random.Generator) -> Chat:
    """Four to nine questions about a grid of words, in which places show only in the order."""
    scene = sample_scene(rng, ANY)
    cells = _row_by_row(in_cells(scene, describe), ", ")
    return _asked(scene, f"Row by row: {cells}, on {scene.background}. ", int(rng.integers(4, 10)), rng)


def statements_dialogue(rng: np.random.Generator) -> Chat:
    """A scene told in words, and four to ten true sentences about its objects."""
    scene = sample_scene(rng, ANY)
    said: list[str] = []
    wanted = int(rng.integers(4, 11))
    while len(said) < wanted:
        statement = true_statement(scene, rng)
        said += [statement] if statement is not None else []
    return [("user", told(scene, rng) + "Tell me about it."), ("assistant", ", ".join(said))]


def retelling_dialogue(rng: np.random.Generator) -> Chat:
    """A scene said again, mostly in another way: object by object, corner by corner, or cell by cell."""
    scene = sample_scene(rng, ANY)
    given = choose(rng, (caption(scene, rng), by_place(scene, rng), by_corner(scene), dense_caption(scene)))
    wanted = (("Say it again:", caption(scene)), ("Go through the corners:", by_corner(scene)), ("Cell by cell:", dense_caption(scene)))
    request, answer = choose(rng, wanted)
    return [("user", f"{request} {given}"), ("assistant", answer)]


def name_dialogue(rng: np.random.Generator) -> Chat:
    """One to three questions about what names mean."""
    chat: Chat = []
    for _ in range(int(rng.integers(1, 4))):
        chat += _said(ask_about_name(choose(rng, named_looks()), rng))
    return chat


def name_statement(rng: np.random.Generator) -> str:
    """A plain sentence that defines a name, or finds the name of a look."""
    named = choose(rng, named_looks())
    look = f"{named.marking} {named.colour} {named.shape}"
    name, look = with_article(named.name), with_article(look)
    wording = (f"{name} is {look}.", f"{look} is called {name}.", f"every {named.name} is {look}.")
    return choose(rng, wording)


def name_of_look_dialogue(rng: np.random.Generator) -> Chat:
    """From a look to its name."""
    named = choose(rng, named_looks())
    look = with_article(f"{named.marking} {named.colour} {named.shape}")
    return [("user", choose(rng, (f"What is {look} called?", f"Which name has {look}?"))), ("assistant", named.name)]


def plain_words_dialogue(rng: np.random.Generator) -> Chat:
    """A description with names, said again in plain words."""
    scene, names = _scene_with_names(rng)
    order = int(rng.integers(1 << 30))
    named, plain = (caption(scene, np.random.default_rng(order), n) for n in (names, None))
    return [("user", f"{choose(rng, ('Say in plain words:', 'Describe plainly:'))} {named}"), ("assistant", plain)]


def fact_dialogue(rng: np.random.Generator) -> Chat:
    """Emblems and towns, both ways, and puzzles."""
    chat: Chat = []
    looks = {n.name: with_article(f"{n.marking} {n.colour} {n.shape}") for n in named_looks()}
    for _ in range(int(rng.integers(1, 4))):
        country = choose(rng, COUNTRIES)
        town = choose(rng, list(countries_of_towns()))
        puzzle = choose(rng, puzzles())
        options = (
            (f"What is the emblem of {country}?", emblems()[country]),
            (f"Of which country is the {emblems()[country]} the emblem?", country),
            (f"Where does {town} lie?", countries_of_towns()[town]),
            (f"What is {puzzle.text}?", puzzle.name),
            (f"What does {puzzle.text} look like?", looks[puzzle.name]),
        )
        question, answer = choose(rng, options)
        chat += [("user", question), ("assistant", answer)]
    return chat


def edited(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene] | None:
    """An instruction and the scene after it, or None where the drawn edit does not fit the scene."""
    thing = choose(rng, scene.objects)
    alike = [o for o in scene.objects if (o.shape, o.colour) == (thing.shape, thing.colour)]
    words = f"the {thing.colour} {thing.shape}"
    kind = choose(rng, ("recolour", "move", "add", "remove", "background"))
    if thing.is_glyph or (len(alike) > 1 and kind in ("recolour", "move", "remove")):
        return None
    if kind == "recolour":
        colour = choose(rng, [other for other in COLOURS if other != thing.colour])
        return choose(rng, (f"Make {words} {colour}.", f"Paint {words} {colour}.")), scene.with_object(replace(thing, colour=colour))
    if kind == "background":
        background = choose(rng, [other for other in BACKGROUNDS if other != scene.background])
        return choose(rng, (f"Change the background to {background}.", f"Put it on {background}.")), replace(scene, background=background)
    if kind == "remove":
        return choose(rng, (f"Remove {words}.", f"Take {words} away.")), scene.without(thing.cell) if len(scene.objects) > 1 else scene
    cell = choose(rng, scene.free_cells)
    if kind == "move":
        return f"Move {words} to the {CELLS[cell]}.", scene.without(thing.cell).with_object(replace(thing, cell=cell))
    fresh = sample_object(rng, cell, SceneRules(use="drawn", split=None, marking_rate=0.0))
    phrase = with_article(f"{fresh.size} {fresh.colour} {fresh.shape}")
    return f"Add {phrase} at the {CELLS[cell]}.", scene.with_object(fresh)


def edit_dialogue(rng: np.random.Generator) -> Chat:
    """A told scene, an instruction, and the scene that results, in words."""
    while True:
        scene = sample_scene(rng, replace(ANY, max_objects=2, tiny_rate=0.0, glyph_rate=0.0))
        edit = edited(scene, rng)
        if edit is not None and edit[1] is not scene:
            return [("user", told(scene) + edit[0]), ("assistant", caption(edit[1]))]


def motion_dialogue(rng: np.random.Generator) -> Chat:
    """Two frames told in words, then the next."""
    clip = sample_clip(rng, choose(rng, ("move", "grow", "recolour")), SceneRules(use="any", split=None))
    first, second, third = (caption(frame) for frame in clip)
    return [("user", f"First: {first}. Then: {second}. What comes next?"), ("assistant", third)]


# What the language model is taught, in an order that makes it quick (LAB_LOG.md): to copy, to find the partner of a word, to find what was
# told of an object, and only then all that the world's text holds.
_COPYING: Shares = ((0.4, repeating_dialogue), (0.4, pairs_again_dialogue), (0.2, pairs_dialogue))
_FINDING: Shares = ((0.1, repeating_dialogue), (0.2, pairs_again_dialogue), (0.5, pairs_dialogue), (0.2, things_dialogue))
_READING: Shares = (
    (0.05, pairs_dialogue),
    (0.2, things_dialogue),
    (0.05, statements_dialogue),
    (0.4, told_scene_dialogue),
    (0.12, retelling_dialogue),
    (0.06, grid_dialogue),
    (0.06, grid_questions_dialogue),
    (0.04, edit_dialogue),
    (0.02, motion_dialogue),
)
_DOCUMENTS: Shares = (
    (0.02, repeating_dialogue),
    (0.03, pairs_dialogue),
    (0.08, things_dialogue),
    (0.06, plain_description),
    (0.04, statements_dialogue),
    (0.2, told_scene_dialogue),
    (0.05, retelling_dialogue),
    (0.06, grid_dialogue),
    (0.05, grid_questions_dialogue),
    (0.12, name_dialogue),
    (0.06, name_statement),
    (0.06, name_of_look_dialogue),
    (0.05, plain_words_dialogue),
    (0.06, fact_dialogue),
    (0.04, edit_dialogue),
    (0.02, motion_dialogue),
)


_LESSONS: Mapping[str, WeightedChoice[Callable[[np.random.Generator], str | Chat]]] = {
    lesson: WeightedChoice([make for _, make in shares], [share for share, _ in shares])
    for lesson, shares in {"copying": _COPYING, "finding": _FINDING, "reading": _READING, "all": _DOCUMENTS}.items()
}


def document(rng: np.random.Generator, lesson: Lesson = "all") -> str | Chat:
    """One document of the corpus: plain text or a chat.

    The lessons before "all" need nothing to be known by heart but the order of colours and places.
    """
    return _LESSONS[lesson](rng)(rng)
