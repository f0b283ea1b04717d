"""How well the model draws: judged on pixels by the classical reader, and on visual tokens against the true ones.

Axes: n images, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from metamorph.batch import TokenSequence
from metamorph.evaluation.metrics import Metric, Metrics, mean, proportion
from metamorph.messages import ImagePart, Message
from metamorph.microworld.examples import to_messages
from metamorph.microworld.names import GROUPS, in_group, named_looks, puzzles
from metamorph.microworld.reader import Reading, read_crop, read_many
from metamorph.microworld.rows import Picture, Row, edit, next_frame, thinking
from metamorph.microworld.scenes import Scene, SceneObject
from metamorph.microworld.subject import Subject, final_text, last_picture
from metamorph.microworld.world import SceneRules, caption, sample_named_scene, sample_scene

REQUEST = "Generate an image of {}."
_COMPARED = ("shape", "colour", "size", "marking")


@dataclass(frozen=True)
class Drawn:
    """A scene that was asked for, and what came of it."""

    wanted: Scene
    tokens: Float[Tensor, "k v"] | None
    picture: Image.Image | None
    reading: Reading | None

    @property
    def exact(self) -> bool:
        """Whether the judge reads the whole scene back."""
        return self.reading is not None and self.reading.scene is not None and self.reading.scene.attributes == self.wanted.attributes

    def attributes(self, wanted: Scene | None = None) -> float:
        """Share of attributes right: those of each wanted object, matched by cell, and the background."""
        wanted = wanted or self.wanted
        hits = [float(self.reading is not None and self.reading.background == wanted.background)]
        for thing in wanted.objects:
            hits += self.matches(thing)
        return float(np.mean(hits))

    def matches(self, thing: SceneObject, compared: Sequence[str] = _COMPARED) -> list[float]:
        """For each attribute of an object, whether the judge reads it in that cell."""
        seen = self.reading.cells[thing.cell].thing if self.reading is not None else None
        return [float(seen is not None and getattr(seen, name) == getattr(thing, name)) for name in compared]


def judge(subject: Subject, wanted: Sequence[Scene], tokens: Sequence[Float[Tensor, "k v"] | None]) -> list[Drawn]:
    """Decode drawings and read them."""
    pictures = subject.decode(tokens)
    readings = iter(read_many([picture for picture in pictures if picture is not None]))
    return [
        Drawn(scene, one, picture, next(readings) if picture is not None else None)
        for scene, one, picture in zip(wanted, tokens, pictures, strict=True)
    ]


def draw_captions(subject: Subject, scenes: Sequence[Scene], captions: Sequence[str]) -> list[Drawn]:
    """Ask for pictures by caption."""
    answers = subject.answer([[Message.user(REQUEST.format(text))] for text in captions])
    return judge(subject, scenes, [last_picture(answer) for answer in answers])


def caption_scenes(samples: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Test scenes of one or two objects, of pairs that training draws or (all objects) of pairs that it never draws."""
    rules = SceneRules("test", use="shown" if held_out else "drawn", max_objects=2, held_out_only=held_out)
    return [sample_scene(np.random.default_rng([seed, 201, int(held_out), index]), rules) for index in range(samples)]


def drawing(subject: Subject, samples: int, seed: int) -> Metrics:
    """Full captions: exact scenes, attributes against chance, and the skill of the predicted tokens."""
    scenes = caption_scenes(samples, seed)
    drawn = draw_captions(subject, scenes, [caption(scene) for scene in scenes])
    others = [*scenes[1:], scenes[0]]
    return {
        "drawing_exact": proportion([one.exact for one in drawn]),
        "drawing_attribute_accuracy": mean([one.attributes() for one in drawn], seed),
        "drawing_attribute_chance": mean([one.attributes(other) for one, other in zip(drawn, others, strict=True)], seed),
        "token_skill": token_skill(subject, drawn, seed),
    }


def token_skill(subject: Subject, drawn: Sequence[Drawn], seed: int) -> Metric:
    """(cos - cos_mean) / (1 - cos_mean): predicted against true tokens; cos_mean = always the mean token of that position.

    An answer without an image counts as cosine 0.
    """
    true = subject.encode([Picture(one.wanted) for one in drawn])
    average = F.normalize(true.mean(0), dim=-1)
    baseline = (true * average).sum(-1).mean()
    predicted = torch.stack([one.tokens if one.tokens is not None else torch.zeros_like(average) for one in drawn])
    cosines = (true * predicted).sum(-1).mean(-1)
    return mean((((cosines - baseline) / (1 - baseline)).tolist()), seed)


def held_out_combinations(subject: Subject, samples: int, seed: int) -> Metrics:
    """Colour-shape pairs that no drawing of the training set shows."""
    scenes = caption_scenes(samples, seed, held_out=True)
    drawn = draw_captions(subject, scenes, [caption(scene) for scene in scenes])
    return {
        "drawing_heldout_combinations": mean([one.attributes() for one in drawn], seed),
        "drawing_heldout_exact": proportion([one.exact for one in drawn]),
    }


def reconstruction(subject: Subject, samples: int, seed: int) -> Metrics:
    """Held-out pictures, encoded and decoded: the bound that the decoder sets."""
    rules = SceneRules("test", use="any")
    scenes = [sample_scene(np.random.default_rng([seed, 202, index]), rules) for index in range(samples)]
    drawn = judge(subject, scenes, list(subject.encode([Picture(scene) for scene in scenes])))
    return {
        "reconstruction_exact": proportion([one.exact for one in drawn]),
        "reconstruction_attribute_accuracy": mean([one.attributes() for one in drawn], seed),
    }


def _rows_drawn(subject: Subject, rows: Sequence[Row]) -> list[Drawn]:
    """Replies to rows whose last picture is the wanted one."""
    wanted = [row.pictures("assistant")[-1].scene for row in rows]
    answers = subject.answer([to_messages(row)[:-1] for row in rows])
    return judge(subject, wanted, [last_picture(answer) for answer in answers])


def edits(subject: Subject, samples: int, seed: int) -> Metrics:
    """Image-to-image: the whole scene after the edit, beside how often the unchanged input would be right."""
    rows = [edit(np.random.default_rng([seed, 203, index]), "test") for index in range(samples)]
    return {"edit_exact": proportion([one.exact for one in _rows_drawn(subject, rows)]), "edit_copy_input": proportion(_copies(rows))}


def next_frames(subject: Subject, samples: int, seed: int) -> Metrics:
    """The frame after two, beside how often the last frame would be right."""
    rows = [next_frame(np.random.default_rng([seed, 204, index]), "test") for index in range(samples)]
    metrics = {"next_frame_exact": proportion([one.exact for one in _rows_drawn(subject, rows)])}
    return {**metrics, "next_frame_copy_input": proportion(_copies(rows))}


def _copies(rows: Sequence[Row]) -> list[bool]:
    return [row.pictures("user")[-1].scene.attributes == row.pictures("assistant")[-1].scene.attributes for row in rows]


def visual_thinking(subject: Subject, samples: int, seed: int) -> Metrics:
    """The crop that the model draws, its answer, and its answer when the crop is another picture's."""
    rows = [thinking(np.random.default_rng([seed, 205, index]), "test", always_asked=True) for index in range(samples)]
    answers = subject.answer([to_messages(row)[:-1] for row in rows])
    truths = [str(row.turns[-1][1][-1]) for row in rows]
    right = [final_text(answer) == truth for answer, truth in zip(answers, truths, strict=True)]
    crops = subject.decode([last_picture(answer) for answer in answers])
    correct = [picture is not None and _shows(picture, row) for picture, row in zip(crops, rows, strict=True)]
    return {
        "thinking_crop_correct": proportion(correct),
        "thinking_answer_accuracy": proportion(right),
        "thinking_answer_swapped_crop": proportion(_answers_after_swap(subject, rows, truths)),
    }


def _shows(picture: Image.Image, row: Row) -> bool:
    """Whether a picture shows the object of which the row wants a crop: its shape, colour, marking and size."""
    wanted = row.pictures("assistant")[-1]
    thing = None if wanted.crop is None else wanted.scene.at(wanted.crop)
    seen = read_crop(picture).cell.thing
    return seen is not None and thing is not None and all(getattr(seen, name) == getattr(thing, name) for name in _COMPARED)


def _answers_after_swap(subject: Subject, rows: Sequence[Row], truths: Sequence[str]) -> list[bool]:
    """Answers after the true thought with the crop's tokens taken from the next row whose answer differs."""
    crops = subject.encode([row.pictures("assistant")[-1] for row in rows])
    prompts = []
    for index, row in enumerate(rows):
        others = [(index + step) % len(rows) for step in range(1, len(rows))]
        other = next((o for o in others if truths[o] != truths[index] and rows[o].type == row.type), index)
        messages = list(to_messages(row))
        thought = (messages[-1].parts[0], ImagePart(visual_tokens=crops[other]))
        messages[-1] = replace(messages[-1], parts=thought)
        prompts.append(_open_ended(subject, subject.pipeline.processor.encode(messages)))
    answers = subject.go_on(prompts, allow_images=False, max_new_tokens=16)
    return [final_text(answer) == truth for answer, truth in zip(answers, truths, strict=True)]


def _open_ended(subject: Subject, sequence: TokenSequence) -> TokenSequence:
    """The sequence up to its last `<image_end>`, so that the model goes on from there."""
    ends = (sequence.input_ids == subject.pipeline.processor.image_end_id).nonzero()
    length = int(ends[-1]) + 1
    return replace(sequence, input_ids=sequence.input_ids[:length], labels=sequence.labels[:length], is_visual=sequence.is_visual[:length])


def named_drawing(subject: Subject, samples: int, seed: int) -> Metrics:
    """Pictures of things asked for by invented name, for each group: shape, colour and marking of the named object.

    Chance is the score of the same drawings against another name.
    """
    metrics: dict[str, Metric] = {}
    looks = named_looks()
    for number, group in enumerate(GROUPS):
        known = in_group(group)
        names = [known[index % len(known)] for index in range(samples)]
        rngs = [np.random.default_rng([seed, 206, number, index]) for index in range(samples)]
        # Up to two objects: some names have no test scene in which they stand alone.
        rules = SceneRules("test", use="drawn", max_objects=2)
        scenes = [sample_named_scene(rng, named, rules) for rng, named in zip(rngs, names, strict=True)]
        things = [next(o for o in scene.objects if o.look == named.look) for scene, named in zip(scenes, names, strict=True)]
        texts = [caption(scene, names={o.cell: named.name}) for scene, o, named in zip(scenes, things, names, strict=True)]
        drawn = draw_captions(subject, scenes, texts)
        others = [looks[int(rng.integers(len(looks)))].made_as(thing) for rng, thing in zip(rngs, things, strict=True)]
        metrics[f"named_drawing/{group}"] = mean(_looks_right(drawn, things), seed)
        metrics[f"named_drawing_chance/{group}"] = mean(_looks_right(drawn, others), seed)
    return metrics


def _looks_right(drawn: Sequence[Drawn], things: Sequence[SceneObject]) -> list[float]:
    """For each drawing, the share of an object's shape, colour and marking that the judge reads in its cell."""
    return [float(np.mean(one.matches(thing, ("shape", "colour", "marking")))) for one, thing in zip(drawn, things, strict=True)]


def puzzle_drawing(subject: Subject, samples: int, seed: int) -> Metrics:
    """Pictures asked for by riddle, by the number of hops: the best match of shape, colour and marking among what is drawn.

    There are only 24 puzzles of each kind: `samples` is not used.
    """
    by_name = {named.name: named for named in named_looks()}
    metrics: dict[str, Metric] = {}
    for hops in (1, 2):
        chosen = [puzzle for puzzle in puzzles() if puzzle.hops == hops]
        answers = subject.answer([[Message.user(REQUEST.format(puzzle.text))] for puzzle in chosen])
        pictures = subject.decode([last_picture(answer) for answer in answers])
        scores = [_likeness(picture, by_name[puzzle.name].look) for picture, puzzle in zip(pictures, chosen, strict=True)]
        metrics[f"puzzle_drawing/{hops}_hop"] = mean(scores, seed)
    return metrics


def _likeness(picture: Image.Image | None, look: tuple[str, str, str]) -> float:
    """The share of a look's three attributes that the best object in a picture has."""
    things = [] if picture is None else [cell.thing for cell in read_many([picture])[0].cells if cell.thing is not None]
    return max((float(np.mean([a == b for a, b in zip(thing.look, look, strict=True)])) for thing in things), default=0.0)
