"""The rules of the microworld, proved over its rows: splits, held-out pairs, name groups, edits, motion, right answers."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from metamorph.microworld.examples import MIXTURE, make_row, training_source
from metamorph.microworld.names import (
    GROUPS,
    HELD_OUT_PAIRS,
    by_look,
    by_name,
    countries_of_towns,
    emblems,
    in_group,
    named_looks,
    puzzles,
)
from metamorph.microworld.questions import SCORED
from metamorph.microworld.rows import KINDS, Row, edit, next_frame, thinking
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, render
from metamorph.microworld.text import document
from metamorph.microworld.world import SceneRules, caption, dense_caption, rejitter, sample_clip, sample_scene, split_of

ROWS = [make_row(kind, 0, "train", index) for kind in KINDS for index in range(400 if kind in ("image_qa", "generation") else 150)]
WORD = re.compile(r"[a-z]+")


def looks_in(row: Row, role: str) -> set[tuple[str, str, str]]:
    return {thing.look for picture in row.pictures(role) for thing in picture.scene.objects}


def names_said(row: Row) -> set[str]:
    return set(WORD.findall(row.words.lower())) & set(by_name())


def test_sixteen_names_in_each_group_and_every_shape_and_colour_twice() -> None:
    assert len({named.name for named in named_looks()}) == len({named.look for named in named_looks()}) == 64
    for group in GROUPS:
        assert set(Counter(named.shape for named in in_group(group)).values()) == {2}
        assert set(Counter(named.colour for named in in_group(group)).values()) == {2}


def test_text_only_names_and_their_looks_are_in_no_row() -> None:
    hidden = in_group("text_only")
    for row in ROWS:
        assert not names_said(row) & {named.name for named in hidden}
        assert not (looks_in(row, "user") | looks_in(row, "assistant")) & {named.look for named in hidden}


def test_asked_names_are_never_drawn_and_drawn_ones_never_shown_or_asked() -> None:
    asked, drawn = in_group("asked"), in_group("drawn")
    for row in ROWS:
        assert not looks_in(row, "assistant") & {named.look for named in asked}, row.kind
        assert not looks_in(row, "user") & {named.look for named in drawn}, row.kind
        if row.kind == "generation":
            assert not names_said(row) & {named.name for named in asked}
        else:
            assert not names_said(row) & {named.name for named in drawn}


def test_each_group_that_may_appear_does() -> None:
    said = Counter(name for row in ROWS for name in names_said(row))
    groups = Counter(by_name()[name].group for name in said)
    assert groups["asked"] >= 12
    assert groups["drawn"] >= 12
    assert groups["both"] >= 14


def test_no_picture_of_the_assistant_shows_a_held_out_pair() -> None:
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    for row in ROWS:
        pairs = {(colour, shape) for shape, colour, _ in looks_in(row, "assistant")}
        assert not pairs & HELD_OUT_PAIRS, row.kind


def test_puzzles_towns_and_facts_of_kept_countries_live_in_text_only() -> None:
    texts = " ".join(row.words for row in ROWS)
    assert not any(town in texts for town in countries_of_towns())
    kept = [country for index, country in enumerate(emblems()) if index % 2 == 1]
    assert not any(country in texts for country in kept)
    assert {puzzle.hops for puzzle in puzzles()} == {1, 2}
    assert all(puzzle.name in by_name() for puzzle in puzzles())


def test_the_languages_models_text_holds_every_name() -> None:
    rng = np.random.default_rng(0)
    words: set[str] = set()
    for _ in range(4000):
        text = document(rng)
        words |= set(WORD.findall(text if isinstance(text, str) else " ".join(said for _, said in text)))
    assert set(by_name()) <= words


@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_share_no_scene(split: str) -> None:
    for kind in ("image_qa", "generation", "thinking", "edit"):
        for index in range(40):
            role = "assistant" if kind == "generation" else "user"
            assert split_of(make_row(kind, 0, split, index).pictures(role)[0].scene) == split


def test_a_row_is_a_function_of_its_number() -> None:
    assert make_row("frames", 3, "train", 17) == make_row("frames", 3, "train", 17)
    assert make_row("frames", 3, "train", 17) != make_row("frames", 4, "train", 17)


def test_the_source_keeps_the_shares_of_the_mixture() -> None:
    source = training_source(size=3000)
    kinds = Counter(source.row(index).kind for index in range(3000))
    for kind, share in MIXTURE.items():
        assert abs(kinds[kind] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5, kind


def test_an_edit_changes_what_it_says_and_nothing_else() -> None:
    for index in range(150):
        row = edit(np.random.default_rng(index), "train")
        before, after = row.pictures("user")[0].scene, row.pictures("assistant")[0].scene
        kept = set(before.objects) & set(after.objects)
        assert len(kept) >= len(before.objects) - 1
        assert before.attributes != after.attributes
        if row.type in ("change", "put"):
            assert before.objects == after.objects
        else:
            assert before.background == after.background


def test_the_next_frame_goes_on_as_the_first_two() -> None:
    for index in range(100):
        row = next_frame(np.random.default_rng(index), "train")
        first, second = (picture.scene for picture in row.pictures("user"))
        third = row.pictures("assistant")[0].scene
        changed = [scene for scene in (second, third) if scene.background == first.background]
        assert len(changed) == 2
        assert first.attributes != second.attributes != third.attributes


def test_a_thought_shows_the_asked_object() -> None:
    for index in range(100):
        row = thinking(np.random.default_rng(index), "train")
        crop, answer = row.pictures("assistant")[0], row.turns[-1][1][-1]
        assert crop.crop is not None
        thing = crop.scene.at(crop.crop)
        assert thing is not None
        assert answer in (thing.colour, thing.shape, thing.size, thing.marking)


@pytest.mark.parametrize("kind", list(SCORED))
def test_answers_to_questions_follow_from_the_scene_alone(kind: str) -> None:
    """Asked again of the scene with fresh jitter, the same question has the same answer; several wordings exist."""
    texts, rng = set(), np.random.default_rng(5)
    for index in range(120):
        scene = sample_scene(rng, SceneRules())
        question = SCORED[kind](scene, np.random.default_rng(index))
        again = SCORED[kind](rejitter(scene, rng), np.random.default_rng(index))
        assert (question is None) == (again is None)
        if question is not None and again is not None:
            assert (question.text, question.answer) == (again.text, again.answer)
            texts.add(question.text.split()[0])
    assert len(texts) >= 1


def test_captions_tell_scenes_apart() -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, SceneRules(use="any", split=None, glyph_rate=0.1, tiny_rate=0.1)) for _ in range(400)]
    different = len({scene.attributes for scene in scenes})
    assert len({caption(scene) for scene in scenes}) == len({dense_caption(scene) for scene in scenes}) == different


@pytest.mark.parametrize("motion", ["move", "grow", "recolour"])
def test_in_a_clip_one_object_changes_in_every_frame(motion: str) -> None:
    for index in range(40):
        clip = sample_clip(np.random.default_rng(index), motion, SceneRules())
        for before, after in pairwise(clip):
            assert len(set(before.objects) ^ set(after.objects)) == 2


def test_scenes_refuse_two_objects_in_one_cell() -> None:
    scene = sample_scene(np.random.default_rng(0), SceneRules())
    with pytest.raises(ValueError, match="each cell holds one object"):
        Scene((scene.objects[0], scene.objects[0]), "snow")


def test_rendering_is_deterministic_and_backgrounds_differ() -> None:
    scene = sample_scene(np.random.default_rng(0), SceneRules())
    assert np.array_equal(render(scene), render(scene))
    bare = [render(Scene((), background)).mean() for background in BACKGROUNDS]
    assert len({round(value) for value in bare}) == 4
    assert all(named.look in by_look() for named in named_looks())
