"""The exercises and grids of the language model's text: answers must follow from what was told, by a second way of finding them."""

from collections.abc import Mapping
from operator import attrgetter

import numpy as np
import pytest

from metamorph.microworld.exercises import pairs_dialogue, things_dialogue
from metamorph.microworld.questions import NUMBERS
from metamorph.microworld.scenes import CELLS, COLOURS, MARKINGS, SHAPES, SIZES
from metamorph.microworld.text import ANY, grid_dialogue, grid_questions_dialogue
from metamorph.microworld.world import describe, sample_scene

VALUES: Mapping[str, tuple[str, ...]] = {
    "size": tuple(SIZES), "marking": tuple(MARKINGS), "colour": tuple(COLOURS), "shape": tuple(SHAPES), "place": tuple(CELLS)
}  # fmt: skip
ATTRIBUTE_OF = {value: attribute for attribute, values in VALUES.items() for value in values}


def as_words(text: str) -> list[str]:
    """Words, a place of two words being one."""
    for cell in CELLS:
        text = text.replace(cell, cell.replace(" ", "_"))
    return [word.replace("_", " ") for word in text.split()]


def as_thing(text: str) -> dict[str, str]:
    return {ATTRIBUTE_OF[word]: word for word in as_words(text)}


def expected_answers(things: list[dict[str, str]], question: str) -> list[str]:
    """What the things say, one answer for each thing that the question's words fit."""
    words = as_words(question.removesuffix("?"))
    wanted = words.pop() if words[-1] in VALUES else None
    given = as_thing(" ".join(words)).items()
    holding = [thing for thing in things if given <= thing.items()]
    return [thing[wanted] for thing in holding] if wanted else ["yes" if holding else "no"]


@pytest.mark.parametrize("seed", range(40))
def test_things_are_looked_up_rightly(seed):
    chat = things_dialogue(np.random.default_rng(seed))
    told, _, first = chat[0][1].partition(". ")
    things = [as_thing(part) for part in told.removeprefix("Cards: ").split(", ")]
    questions = [first, *(said for role, said in chat[2:] if role == "user")]
    answers = [said for role, said in chat if role == "assistant"]
    assert questions and [expected_answers(things, question) for question in questions] == [[answer] for answer in answers]


def test_things_are_asked_for_all_attributes_and_for_what_is_not_there():
    answers = [said for seed in range(400) for role, said in things_dialogue(np.random.default_rng(seed)) if role == "assistant"]
    share = {
        attribute: np.mean([answer in values for answer in answers])
        for attribute, values in {**VALUES, "no": ("no",), "yes": ("yes",)}.items()
    }
    assert min(share.values()) > 0.05, share


def test_pairs_give_the_partner_in_both_directions():
    seen: set[bool] = set()
    for seed in range(40):
        chat = pairs_dialogue(np.random.default_rng(seed))
        told, _, first = chat[0][1].partition(". ")
        pairs = [tuple(as_words(pair)) for pair in told.removeprefix("Pairs: ").split(", ")]
        questions = [first, *(said for role, said in chat[2:] if role == "user")]
        for question, answer in zip(questions, (said for role, said in chat if role == "assistant"), strict=True):
            word = question.removesuffix("?")
            partner = answer.removeprefix(word + " ")
            assert (word, partner) in pairs or (partner, word) in pairs
            seen.add((word, partner) in pairs)
    assert seen == {True, False}


@pytest.mark.parametrize("seed", range(20))
def test_grids_of_words_show_the_told_scene_as_visual_tokens_lie(seed):
    scene = sample_scene(np.random.default_rng(seed), ANY)  # what both dialogues draw first
    chat = grid_dialogue(np.random.default_rng(seed))
    told, _, _ = grid_questions_dialogue(np.random.default_rng(seed))[0][1].partition(", on ")
    grids = [(told.removeprefix("Row by row: ").split(", "), describe)]
    for (_, asked), (_, said) in zip(chat[::2], chat[1::2], strict=True):
        grids.append((said.split(), attrgetter(asked.removesuffix(":").split()[-1])))
    for words, wanted in grids:
        grid = np.array(words).reshape(4, 4)
        for cell in range(4):
            row, column = 2 * (cell // 2), 2 * (cell % 2)
            thing = scene.at(cell)
            assert set(grid[row : row + 2, column : column + 2].flat) == {"nothing" if thing is None else wanted(thing)}


def test_questions_about_grids_are_answered_by_the_scene():
    for seed in range(40):
        chat = grid_questions_dialogue(np.random.default_rng(seed))
        scene = sample_scene(np.random.default_rng(seed), ANY)
        for (_, asked), (_, answer) in zip(chat[::2], chat[1::2], strict=True):
            question = asked.partition(f", on {scene.background}. ")[2] or asked
            if question in ("How many objects are there?", "How many objects do you see?"):
                assert answer == NUMBERS[len(scene.objects)]
            place = next((cell for cell, name in enumerate(CELLS) if f"the object at the {name}" in question), None)
            thing = None if place is None else scene.at(place)
            if thing is not None and "colour" in question:
                assert answer == thing.colour
