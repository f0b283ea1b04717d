"""The judge is judged: floors on rendered, degraded and spoiled pictures. Full sizes run under `slow`."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import metamorph
from metamorph.errors import MediaError
from metamorph.microworld.reader import Reading, read_crop, read_many, read_scene
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, GLYPHS, MARKINGS, SHAPES, SIZES, TINY, Scene, SceneObject, crop_cell, render
from metamorph.microworld.spoiled import SPOILERS, spoiled_pictures
from metamorph.microworld.world import SceneRules, sample_scene

RULES = SceneRules(split=None, use="any", glyph_rate=0.05, tiny_rate=0.05)


def jpeg(image, rng, quality=60):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def noisy(image, rng, sigma=0.05):
    return np.clip(np.rint(image + rng.normal(0, 255 * sigma, image.shape)), 0, 255).astype(np.uint8)


def softened(image, rng):
    """What a small diffusion decoder does: blur, a shift of each channel, soft noise."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))
    return noisy(np.clip(blurred + rng.uniform(-8, 8, 3), 0, 255), rng, 0.02)


DEGRADATIONS = {
    "jpeg": (jpeg, 0.98),
    "noise": (noisy, 0.98),
    "noise then jpeg": (lambda image, rng: jpeg(noisy(image, rng), rng), 0.98),
    "jpeg then noise": (lambda image, rng: noisy(jpeg(image, rng), rng), 0.98),
    "soft": (softened, 0.95),
}


def scenes(count, seed=11):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, RULES) for _ in range(count)]


def exact(truth: Scene, reading: Reading) -> bool:
    return reading.scene is not None and reading.scene.attributes == truth.attributes


def share_exact(truths, images) -> float:
    return float(np.mean([exact(truth, reading) for truth, reading in zip(truths, read_many(images), strict=True)]))


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_rendered_scenes_are_read_exactly(count):
    truths = scenes(count)
    assert share_exact(truths, [render(scene) for scene in truths]) >= 0.995


@pytest.mark.parametrize("degradation", DEGRADATIONS)
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_degraded_scenes_are_read(count, degradation):
    spoil, floor = DEGRADATIONS[degradation]
    truths, rng = scenes(count, seed=12), np.random.default_rng(13)
    assert share_exact(truths, [spoil(render(scene), rng) for scene in truths]) >= floor


def test_every_look_is_read_in_every_colour_and_size():
    marked = [(shape, size, marking) for shape in SHAPES for size in SIZES for marking in MARKINGS]
    kinds = [*marked, *((shape, TINY, "plain") for shape in SHAPES), *((glyph, size, "plain") for glyph in GLYPHS for size in SIZES)]
    truths = []
    for index, (shape, size, marking) in enumerate(kinds):
        for step, background in enumerate(BACKGROUNDS[index % 2 :: 2]):
            thing = SceneObject(
                shape, COLOURS[(index + 2 * step) % 8], size, step, marking, dx=0.9 - 0.6 * step, dy=-0.4, stretch=0.04 - 0.02 * step
            )
            truths.append(Scene((thing,), background))
    assert share_exact(truths, [render(scene) for scene in truths]) == 1.0


@pytest.mark.parametrize("per_kind", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_spoiled_pictures_are_refused(per_kind):
    pictures = spoiled_pictures(per_kind)
    readings = read_many(picture.image for picture in pictures)
    refused = Counter(picture.kind for picture, reading in zip(pictures, readings, strict=True) if reading.scene is None)
    assert refused.total() >= 0.95 * len(pictures), refused
    assert min(refused[kind] for kind in SPOILERS) >= 0.65 * per_kind, refused
    assert all(reading.reason for reading in readings if reading.scene is None)


def test_spoiled_set_is_fixed():
    first, second = spoiled_pictures(2), spoiled_pictures(2)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_cells_are_read_beside_an_unreadable_one():
    scene = Scene((SceneObject("star", "red", "large", 0), SceneObject("moon", "cyan", "small", 3, "eyed")), "slate")
    image = render(scene)
    image[:16, :32] = render(Scene((), "slate"))[:16, :32]
    reading = read_scene(image)
    assert reading.scene is None
    assert reading.background == "slate"
    assert [cell.state for cell in reading.cells] == ["unreadable", "empty", "empty", "object"]
    thing = reading.cells[3].thing
    assert thing is not None
    assert thing.attributes == ("moon", "cyan", "eyed", "small", 3)
    assert "cell 0" in reading.reason


def test_jitter_is_measured():
    thing = SceneObject("heart", "blue", "large", 2, dx=0.8, dy=-0.6, stretch=0.03)
    found = read_scene(render(Scene((thing,), "snow"))).cells[2].thing
    assert found is not None
    assert (found.dx, found.dy, found.stretch) == pytest.approx((0.8, -0.6, 0.03), abs=0.05)


def test_a_bare_background_is_four_empty_cells():
    for background in BACKGROUNDS:
        reading = read_scene(render(Scene((), background)))
        assert reading.scene == Scene((), background)


def test_crops_are_read_as_cells():
    right = total = 0
    for scene in scenes(30, seed=14):
        image = render(scene)
        for cell in range(4):
            reading, truth = read_crop(crop_cell(image, cell)), scene.at(cell)
            found = reading.cell.thing
            same = (
                (found is None and reading.cell.state == "empty")
                if truth is None
                else found is not None and found.attributes[:4] == truth.attributes[:4]
            )
            right, total = right + (same and reading.background == scene.background), total + 1
    assert right >= 0.99 * total


def test_a_crop_of_noise_or_of_a_whole_scene_is_refused():
    rng = np.random.default_rng(15)
    assert read_crop(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).cell.state == "unreadable"
    three = Scene(tuple(SceneObject(shape, "red", "large", cell) for cell, shape in enumerate(SHAPES[:3])), "sand")
    assert read_crop(render(three)).cell.state == "unreadable"


def test_pil_pictures_and_arrays_read_alike_and_repeatably():
    image = render(scenes(1)[0])
    assert read_scene(image) == read_scene(Image.fromarray(image)) == read_scene(image)


def test_an_object_drawn_in_the_wrong_cell_is_another_scene():
    thing = SceneObject("square", "green", "small", 1)
    found = read_scene(render(Scene((replace(thing, cell=2),), "night"))).scene
    assert found is not None
    assert found.attributes != Scene((thing,), "night").attributes


def test_other_sizes_are_refused():
    with pytest.raises(MediaError, match=r"\(32, 64, 3\) but .*\(64, 64, 3\)"):
        read_scene(Image.new("RGB", (64, 32)))


SPEED = """
import time, numpy as np
from metamorph.microworld.reader import read_many
from metamorph.microworld.scenes import render
from metamorph.microworld.world import SceneRules, sample_scene
rng = np.random.default_rng(0)
images = [render(sample_scene(rng, SceneRules(split=None, use="any"))) for _ in range(60)]
read_many(images[:5])
start = time.process_time()
read_many(images)
print((time.process_time() - start) / len(images))
"""


@pytest.mark.slow
def test_reading_is_fast():
    # In a process of its own: the shape checks of this one would be timed too.
    environment = {**os.environ, "PYTHONPATH": str(Path(metamorph.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SPEED], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 0.015
