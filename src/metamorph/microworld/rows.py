"""The six kinds of VPiT data, as rows of scenes and words: each kind is a pure function of generator and rules.

A row holds scenes, not pixels, so that its truth stays known: tests prove the rules of the name groups on rows,
the evaluation scores replies against them, and `examples.py` only draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from metamorph.microworld.names import COUNTRIES, in_group
from metamorph.microworld.questions import EXTRA, LEARNT_LAST, SCORED, Question, ask_colour, ask_marking, ask_shape, ask_size
from metamorph.microworld.scenes import CELLS, Motion, Scene
from metamorph.microworld.text import edited
from metamorph.microworld.world import (
    SceneRules,
    Split,
    caption,
    choose,
    is_allowed,
    partial_caption,
    sample_clip,
    sample_named_scene,
    sample_scene,
)

Kind = Literal["image_qa", "generation", "video_qa", "frames", "thinking", "edit"]
REPLY_TO_REQUEST = "Here is an image based on your request:"
THINKING_PHRASE = "I will think about it visually."
THINKING_REQUESTS = ("Think visually.", "Look closely.", "Think about it visually first.")
REQUESTS = ("Generate an image of {}.", "Generate an image of {}", "Draw {}.", "Show me {}.", "Make a picture of {}.")
DESCRIPTION_RATE = 0.35
MOTIONS: tuple[Motion, ...] = ("move", "grow", "recolour")
MOTION_WORDS = {"move": "it moves", "grow": "it grows", "recolour": "it changes colour"}


@dataclass(frozen=True)
class Picture:
    """A picture in a row: a scene, or one of its cells enlarged."""

    scene: Scene
    crop: int | None = None


_ASKING = {**SCORED, **EXTRA}
RowPart = str | Picture | tuple[Picture, ...]


@dataclass(frozen=True)
class Row:
    """A conversation of words and pictures. A tuple of pictures is a video. `type` names the sort within the kind."""

    kind: str
    turns: tuple[tuple[str, tuple[RowPart, ...]], ...]
    type: str = ""

    def pictures(self, role: str) -> tuple[Picture, ...]:
        """All pictures that one role shows, in order."""
        found: list[Picture] = []
        for speaker, parts in self.turns:
            for part in parts if speaker == role else ():
                found += [part] if isinstance(part, Picture) else part if isinstance(part, tuple) else []
        return tuple(found)

    @property
    def words(self) -> str:
        """All text of the row."""
        return " ".join(part for _, parts in self.turns for part in parts if isinstance(part, str))


def _fact_may_be_asked(question: Question, split: Split) -> bool:
    """Facts of every other country are asked in training; the rest are kept for the test, where only text can have taught them."""
    trained = COUNTRIES.index(question.answer) % 2 == 0 if question.type == "fact" else True
    return trained if split == "train" else question.type != "fact" or not trained


def ask(scene: Scene, rng: np.random.Generator, split: Split, types: tuple[str, ...]) -> Question | None:
    """A question of one of the types, or None if the drawn one does not fit the scene."""
    question = _ASKING[choose(rng, types)](scene, rng)
    return question if question is not None and _fact_may_be_asked(question, split) else None


def _scene_to_ask_about(rng: np.random.Generator, split: Split, types: tuple[str, ...] | None) -> tuple[Scene, tuple[str, ...]]:
    """A picture, and the types of question that suit it: some hold named things, glyphs or tiny objects."""
    pick = rng.random()
    if types in (("named",), ("fact",)) or (types is None and pick < 0.3):
        named = choose(rng, in_group("asked") + in_group("both"))
        return sample_named_scene(rng, named, SceneRules(split)), types or (*("named",) * 5, "fact", *SCORED)
    glyph = types == ("glyph",) or (types is None and pick < 0.38)
    tiny = types == ("fine_detail",) or (types is None and pick > 0.92)
    scene = sample_scene(rng, SceneRules(split, glyph_rate=0.5 * glyph, tiny_rate=0.5 * tiny))
    return scene, types or (*SCORED, *LEARNT_LAST, *(("glyph",) * 4 if glyph else ()), *(("fine_detail",) * 4 if tiny else ()))


def description(rng: np.random.Generator, split: Split) -> Row:
    """An image and its full caption: every attribute of it in one answer, which is how a projector learns fastest."""
    if rng.random() < 0.3:
        named = choose(rng, in_group("asked") + in_group("both"))
        scene = sample_named_scene(rng, named, SceneRules(split))
        names = {thing.cell: named.name for thing in scene.objects if thing.look == named.look}
        request = choose(rng, ("Describe the picture by name.", "Name what you see."))
        return Row("image_qa", (("user", (Picture(scene), request)), ("assistant", (caption(scene, names=names),))), "description")
    scene = sample_scene(rng, SceneRules(split, glyph_rate=0.05, tiny_rate=0.05))
    request = choose(rng, ("Describe the picture.", "What do you see?", "Tell me what is in the picture."))
    return Row("image_qa", (("user", (Picture(scene), request)), ("assistant", (caption(scene),))), "description")


def image_qa(rng: np.random.Generator, split: Split, types: tuple[str, ...] | None = None, turns: int | None = None) -> Row:
    """An image, and up to five questions about it with short answers, or a request to describe it."""
    if types is None and rng.random() < DESCRIPTION_RATE:
        return description(rng, split)
    asked: list[Question] = []
    while not asked:
        scene, pool = _scene_to_ask_about(rng, split, types)
        wanted = turns or int(rng.integers(2, 6))
        different: dict[str, Question] = {}
        for _ in range(4 * wanted):
            question = ask(scene, rng, split, pool)
            if question is not None:
                different.setdefault(question.text, question)
            if len(different) == wanted:
                break
        asked = list(different.values())
    said: list[tuple[str, tuple[RowPart, ...]]] = []
    for index, question in enumerate(asked):
        shown = (Picture(scene),) if index == 0 else ()
        said += [("user", (*shown, question.text)), ("assistant", (question.answer,))]
    return Row("image_qa", tuple(said), asked[0].type)


def generation(rng: np.random.Generator, split: Split) -> Row:
    """A request with a caption (full, partial, or with invented names), then the picture; sometimes a question about it."""
    rules, pick = SceneRules(split, use="drawn", glyph_rate=0.03), rng.random()
    names: dict[int, str] = {}
    if pick < 0.3:
        named = choose(rng, in_group("drawn") + in_group("both"))
        scene = sample_named_scene(rng, named, replace(rules, max_objects=2))
        names = {thing.cell: named.name for thing in scene.objects if thing.look == named.look}
    else:
        scene = sample_scene(rng, rules)
    partial = 0.3 <= pick < 0.45
    text = partial_caption(scene, rng) if partial else caption(scene, rng, names)
    turns: list[tuple[str, tuple[RowPart, ...]]] = [
        ("user", (choose(rng, REQUESTS).format(text),)),
        ("assistant", (REPLY_TO_REQUEST, Picture(scene))),
    ]
    if not names and rng.random() < 0.12:
        question = ask(scene, rng, split, tuple(SCORED))
        if question is not None:
            turns += [("user", (question.text,)), ("assistant", (question.answer,))]
    return Row("generation", tuple(turns), "named" if names else "partial" if partial else "full")


def video_qa(rng: np.random.Generator, split: Split) -> Row:
    """Three frames and a question about what happens."""
    motion = choose(rng, MOTIONS)
    clip = sample_clip(rng, motion, SceneRules(split))
    changed = next(thing for thing in clip[-1].objects if thing not in clip[0].objects)
    options = [("What happens to the object that changes?", MOTION_WORDS[motion]), ("What changes here?", MOTION_WORDS[motion])]
    options.append(("Where is the object that changes at the end?", CELLS[changed.cell]))
    options.append(("What shape is the object that changes?", changed.shape))
    question, answer = choose(rng, options)
    return Row("video_qa", (("user", (tuple(map(Picture, clip)), question)), ("assistant", (answer,))), motion)


def next_frame(rng: np.random.Generator, split: Split) -> Row:
    """Two frames, then the third (forward prediction)."""
    clip = sample_clip(rng, choose(rng, MOTIONS), SceneRules(split, use="drawn"))
    request = choose(rng, ("Draw the next frame.", "What comes next?", "Show the next frame."))
    shown = (Picture(clip[0]), Picture(clip[1]))
    return Row("frames", (("user", (shown, request)), ("assistant", (Picture(clip[2]),))), "forward")


def _missing_frame(rng: np.random.Generator, clip: tuple[Scene, ...]) -> Row:
    request = choose(rng, ("Draw the missing frame.", "Draw the frame between these."))
    return Row("frames", (("user", (Picture(clip[0]), Picture(clip[2]), request)), ("assistant", (Picture(clip[1]),))), "completion")


def _first_frame(rng: np.random.Generator, clip: tuple[Scene, ...]) -> Row:
    request = choose(rng, ("Draw the frame before these.", "Play it backwards. Draw the next frame."))
    shown = (Picture(clip[1]), Picture(clip[2])) if request.startswith("Draw") else (Picture(clip[2]), Picture(clip[1]))
    return Row("frames", (("user", (shown, request)), ("assistant", (Picture(clip[0]),))), "reverse")


def _reordered(rng: np.random.Generator, clip: tuple[Scene, ...]) -> Row:
    shuffled = tuple(Picture(clip[i]) for i in rng.permutation(3))
    request = "These frames are in the wrong order. Put them in order."
    return Row("frames", (("user", (shuffled, request)), ("assistant", tuple(map(Picture, clip)))), "reorder")


def _next_two(rng: np.random.Generator, clip: tuple[Scene, ...]) -> Row:
    shown, drawn = tuple(map(Picture, clip[:2])), tuple(map(Picture, clip[2:]))
    return Row("frames", (("user", (shown, f"Draw the next {len(drawn)} frames.")), ("assistant", drawn)), "next_several")


def _interval(rng: np.random.Generator, clip: tuple[Scene, ...]) -> Row:
    steps = int(rng.integers(1, 3))
    request = "How many steps lie between these frames?"
    answer = ("one", "two")[steps - 1]
    return Row("frames", (("user", (Picture(clip[0]), Picture(clip[steps]), request)), ("assistant", (answer,))), "interval")


def frames(rng: np.random.Generator, split: Split) -> Row:
    """Pure video in the paper's variants: forward, completion, reverse, re-ordering, several next frames, interval."""
    if rng.random() < 0.5:
        return next_frame(rng, split)
    make, length, motions = choose(
        rng,
        (
            (_missing_frame, 3, MOTIONS),
            (_first_frame, 3, ("move", "recolour")),
            (_reordered, 3, MOTIONS),
            (_next_two, 4, ("recolour",)),
            (_interval, 3, MOTIONS),
        ),
    )
    clip = sample_clip(rng, choose(rng, motions), SceneRules(split, use="drawn"), frames=length)
    return make(rng, clip)


def thinking(rng: np.random.Generator, split: Split, always_asked: bool = False) -> Row:
    """An image and a question; the reply says that it thinks visually, shows the crop of the asked object, and answers."""
    while True:
        scene = sample_scene(rng, SceneRules(split, use="drawn"))
        question = choose(rng, (ask_colour, ask_shape, ask_size, ask_marking))(scene, rng)
        if question is None or question.cell is None:
            continue
        request = f" {choose(rng, THINKING_REQUESTS)}" if always_asked or rng.random() < 0.85 else ""
        reply = (THINKING_PHRASE, Picture(scene, crop=question.cell), question.answer)
        turns = (("user", (Picture(scene), question.text + request)), ("assistant", reply))
        return Row("thinking", turns, question.type)


def edit(rng: np.random.Generator, split: Split) -> Row:
    """An image and an instruction (recolour, move, add, remove, background), then the image after it; all else stays."""
    while True:
        scene = sample_scene(rng, SceneRules(split, use="drawn", max_objects=2))
        made = edited(scene, rng)
        if made is None or made[1] is scene or not _may_be_drawn(made[1]):
            continue
        type_ = made[0].split()[0].lower()
        return Row("edit", (("user", (Picture(scene), made[0])), ("assistant", (Picture(made[1]),))), type_)


def _may_be_drawn(scene: Scene) -> bool:
    """Whether the assistant may draw all objects of a scene: no held-out pair, no named look."""
    return all(is_allowed(thing, SceneRules(use="drawn")) for thing in scene.objects)


KINDS: Mapping[str, Callable[[np.random.Generator, Split], Row]] = {
    "image_qa": image_qa,
    "generation": generation,
    "video_qa": video_qa,
    "frames": frames,
    "thinking": thinking,
    "edit": edit,
}
