"""Exercises before reading and beside it: to copy, to find a word's partner, to look up what goes with one or two words.

A small model reads a told scene only after it can copy and find; lookups teach it as much as told scenes do (LAB_LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from metamorph.microworld.scenes import BACKGROUNDS, CELLS, COLOURS, MARKINGS, SHAPES, SIZES
from metamorph.microworld.world import choose

Chat = list[tuple[str, str]]
_Thing = dict[str, str]  # attribute: value
_WORDS = (*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, *MARKINGS, *CELLS, "nothing", "yes", "no", "none", "one", "two", "three")
_ATTRIBUTES: Mapping[str, Sequence[str]] = {"size": SIZES, "marking": MARKINGS, "colour": COLOURS, "shape": SHAPES, "place": CELLS}


def dialogue(opening: str, asked: Iterable[tuple[str, str]]) -> Chat:
    """Questions with their answers as a chat, `opening` before the first."""
    chat: Chat = []
    for question, answer in asked:
        chat += [("user", ("" if chat else opening) + question), ("assistant", answer)]
    return chat


def repeating_dialogue(rng: np.random.Generator) -> Chat:
    """Words in a random order, said again."""
    said = " ".join(choose(rng, _WORDS) for _ in range(int(rng.integers(5, 25))))
    return [("user", f"Repeat: {said}"), ("assistant", said)]


def _pairs(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    """Words as they are introduced in pairs, and a list of pairs to come back to, first word first or last."""
    words = [_WORDS[i] for i in rng.permutation(len(_WORDS))[: 2 * int(rng.integers(3, 9))]]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    again = [choose(rng, pairs) for _ in range(int(rng.integers(len(pairs), 2 * len(pairs))))]
    return f"Pairs: {', '.join(' '.join(pair) for pair in pairs)}.", [pair if rng.random() < 0.5 else pair[::-1] for pair in again]


def pairs_again_dialogue(rng: np.random.Generator) -> Chat:
    """Pairs of words, gone through in any order and direction: a partner follows its word at once."""
    given, again = _pairs(rng)
    return [("user", f"{given} Go through them."), ("assistant", ", ".join(" ".join(pair) for pair in again))]


def pairs_dialogue(rng: np.random.Generator) -> Chat:
    """Pairs of words; then words ask for their partners, which some dialogues answer with the word repeated."""
    given, again = _pairs(rng)
    repeated = rng.random() < 0.3
    return dialogue(f"{given} ", ((f"{word}?", f"{word} {partner}" if repeated else partner) for word, partner in again))


def _things(rng: np.random.Generator) -> list[_Thing]:
    """Two to four things with the same two to five attributes, often alike in some."""
    attributes = list(_ATTRIBUTES)
    if rng.random() < 0.5:
        attributes = [attributes[i] for i in sorted(rng.permutation(len(attributes))[: int(rng.integers(2, len(attributes)))])]
    count = int(rng.integers(2, 5))
    columns: dict[str, list[str]] = {}
    for attribute in attributes:
        values = _ATTRIBUTES[attribute]
        differ = len(values) >= count and rng.random() < 0.6
        columns[attribute] = (
            [values[i] for i in rng.permutation(len(values))[:count]] if differ else [choose(rng, values) for _ in range(count)]
        )
    return [{attribute: columns[attribute][i] for attribute in attributes} for i in range(count)]


def _asked_whether(things: list[_Thing], keys: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Whether a thing holds some words together: those of one thing, those of several, or either with one word changed."""
    if rng.random() < 0.3:
        probe = {key: choose(rng, things)[key] for key in keys}
    else:
        one = choose(rng, things)
        probe = {key: one[key] for key in keys}
    if rng.random() < 0.25:
        changed = choose(rng, keys)
        probe[changed] = choose(rng, _ATTRIBUTES[changed])
    there = any(all(thing[key] == probe[key] for key in keys) for thing in things)
    return f"{' '.join(probe[key] for key in keys)}?", "yes" if there else "no"


def _looked_up(things: list[_Thing], keys: list[str], rng: np.random.Generator) -> tuple[str, str] | None:
    """One attribute of the thing that the others named single out, if they do."""
    thing = choose(rng, things)
    hidden = [attribute for attribute in thing if attribute not in keys]
    alike = [other for other in things if all(other[key] == thing[key] for key in keys)]
    if not hidden or len(alike) > 1:
        return None
    wanted = choose(rng, hidden)
    return f"{' '.join(thing[key] for key in keys)} {wanted}?", thing[wanted]


def _lookups(things: list[_Thing], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to `count` questions of a few words with their answers: an attribute by one or two others, or whether words go together."""
    attributes = list(things[0])
    asked: list[tuple[str, str]] = []
    for _ in range(count):
        keys = [attributes[i] for i in rng.permutation(len(attributes))[: int(rng.integers(1, 3))]]
        question = _asked_whether(things, keys, rng) if rng.random() < 0.3 else _looked_up(things, keys, rng)
        asked += [question] if question is not None else []
    return asked


def things_dialogue(rng: np.random.Generator) -> Chat:
    """Things by their attributes, in any order of words in half of the dialogues; then questions that look attributes up."""
    things = _things(rng)
    attributes, mixed = list(things[0]), rng.random() < 0.5
    order = [[attributes[i] for i in rng.permutation(len(attributes))] if mixed else attributes for _ in things]
    told = ", ".join(" ".join(thing[attribute] for attribute in said) for thing, said in zip(things, order, strict=True))
    return dialogue(f"Cards: {told}. ", _lookups(things, int(rng.integers(10, 20)), rng)) or things_dialogue(rng)
