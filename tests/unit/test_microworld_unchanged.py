"""The shipped weights and the demo's expected band rest on these rows and pixels: faster code must make the same ones."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tests import reference_scenes

from metamorph.microworld.examples import MIXTURE, MicroworldSource, make_row
from metamorph.microworld.rows import Row
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, GLYPHS, MARKINGS, RADIUS, SHAPES, Scene, SceneObject, draw_object, render
from metamorph.microworld.text import document
from metamorph.microworld.world import WeightedChoice, generator

ROWS = {
    "image_qa": "b7319530b25e4740",
    "generation": "09e24ec14e23f5eb",
    "video_qa": "570a419d0a0ce088",
    "frames": "20e8e0908280dbbb",
    "thinking": "bf9053ba117788ec",
    "edit": "25f9c3858092426c",
    "text": "129802ccdd5a39e5",
    "mixture": "48c0e2ff22eeeb55",
    "documents": "84d6c2f524fe513b",
}


def digest(rows: list) -> str:
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


def words_and_looks(row: Row) -> tuple:
    """All of a row but the jitter, whose last bit is a matter of the processor."""
    scenes = [(picture.scene.attributes, picture.crop) for role in ("user", "assistant") for picture in row.pictures(role)]
    return row.kind, row.type, [[part for part in parts if isinstance(part, str)] for _, parts in row.turns], scenes


@pytest.mark.parametrize("kind", MIXTURE)
def test_rows_are_the_ones_that_the_weights_have_read(kind):
    rows = [words_and_looks(make_row(kind, 5, split, index)) for split in ("train", "validation", "test") for index in range(60)]
    assert digest(rows) == ROWS[kind]


def test_the_mixture_and_the_texts_are_the_ones_that_the_weights_have_read():
    source, rng = MicroworldSource(seed=4), np.random.default_rng(3)
    assert digest([words_and_looks(source.row(index)) for index in range(150)]) == ROWS["mixture"]
    assert digest([document(rng) for _ in range(400)]) == ROWS["documents"]


def test_pixels_equal_the_slow_twin():
    rng = np.random.default_rng(1)
    for thing in things(rng):
        scene = Scene((thing,), BACKGROUNDS[int(rng.integers(4))])
        assert np.array_equal(render(scene), reference_scenes.render(scene)), scene
        cell = rng.uniform(0, 255, (32, 32, 3)).astype(np.float32)
        ours, twin = draw_object(cell, thing), reference_scenes.draw_object(cell, thing)
        assert ours.dtype == twin.dtype
        assert np.array_equal(ours, twin), thing


def test_pixels_of_several_objects_equal_the_slow_twin():
    source = MicroworldSource(seed=6)
    scenes = [p.scene for index in range(150) for role in ("user", "assistant") for p in source.row(index).pictures(role)]
    assert len(scenes) > 100
    for scene in scenes:
        assert np.array_equal(render(scene), reference_scenes.render(scene)), scene


def things(rng: np.random.Generator) -> list[SceneObject]:
    """Every shape and glyph in every size with every marking, at a random place."""
    found = []
    for shape in (*SHAPES, *GLYPHS):
        for size in RADIUS:
            for marking in MARKINGS:
                dx, dy, stretch = rng.uniform(-1, 1, 3) * (1, 1, 0.04)
                found.append(SceneObject(shape, COLOURS[len(found) % 8], size, len(found) % 4, marking, dx, dy, stretch))
    return found


def test_generators_and_choices_are_numpys_own():
    for numbers in ((0, 1), (3, 1, 4, 4294967295), (7, 1 << 32), (1 << 70, 5)):
        assert generator(*numbers).bit_generator.state == np.random.default_rng(list(numbers)).bit_generator.state
    shares = [0.1, 0.0, 3.0, 0.4]
    draw, ours, numpys = WeightedChoice("abcd", shares), np.random.default_rng(2), np.random.default_rng(2)
    drawn = [draw(ours) for _ in range(500)]
    assert drawn == [str(numpys.choice(list("abcd"), p=np.array(shares) / sum(shares))) for _ in range(500)]
    assert set(drawn) == set("acd")
