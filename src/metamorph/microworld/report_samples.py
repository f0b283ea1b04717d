"""What the model does, to be looked at: answers, drawings, edits, thoughts, each beside the truth.

Samples are the first ones of a seed, never chosen for being good; where right and wrong ones are shown apart, the
heading says how many there were of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from metamorph.messages import Message, TextPart
from metamorph.microworld.answering import ask_all, question_rows
from metamorph.microworld.drawing import Drawn, caption_scenes, draw_captions, judge
from metamorph.microworld.examples import draw, to_messages
from metamorph.microworld.names import GROUPS, in_group
from metamorph.microworld.questions import EXTRA, SCORED, ask_colour, ask_shape
from metamorph.microworld.rows import Picture, Row, edit, next_frame, thinking
from metamorph.microworld.subject import Subject, final_text, last_picture
from metamorph.microworld.world import SceneRules, caption, choose, sample_named_scene, sample_scene
from metamorph.reporting.blocks import Block, Conversation, Heading, ImageGrid, Paragraph, PictureCard

SHOWN_SEED = 31  # other samples than those that are scored
_GROUP_WORDS = {
    "text_only": "Known only from the language model's text: never seen, never drawn",
    "asked": "Asked about in pictures, never drawn",
    "drawn": "Drawn in training, never asked about",
    "both": "Asked about and drawn",
}


def _missing() -> Image.Image:
    """Stands where the model drew nothing: white with a grey diagonal."""
    return Image.fromarray(np.where(np.abs(np.subtract.outer(np.arange(64), np.arange(64))) < 2, 170, 255).astype(np.uint8)).convert("RGB")


def _or_missing(picture: Image.Image | None) -> Image.Image:
    return picture if picture is not None else _missing()


def questions(subject: Subject, asked: int = 78, shown: int = 9) -> list[Block]:
    """Questions about pictures, right answers and wrong ones apart."""
    rows = question_rows((*SCORED, *EXTRA), asked, SHOWN_SEED)
    answers = ask_all(subject, rows)
    cards: dict[bool, list[PictureCard]] = {True: [], False: []}
    for row, one in zip(rows, answers, strict=True):
        question = next(part for part in row.turns[0][1] if isinstance(part, str))
        said = f"“{one.said}”" if one.said else "nothing"
        text = f"says {said}" + ("" if one.right else f"; the truth is “{one.truth}”")
        cards[one.right].append(PictureCard([draw(row.pictures("user")[0])], question, text, correct=one.right))
    blocks: list[Block] = [
        Heading("Questions about pictures"),
        Paragraph(f"{asked} questions of all types: {len(cards[True])} answered right, {len(cards[False])} wrong. Some of each."),
    ]
    for right, words in ((True, "Right"), (False, "Wrong")):
        some = cards[right][:: max(1, len(cards[right]) // shown)][:shown]
        blocks += [Heading(words, 3), ImageGrid(some, cell=9)] if some else []
    return blocks


def _card(one: Drawn, title: str, correct: bool, given: Sequence[Picture] = (), labels: Sequence[str] = ()) -> PictureCard:
    """Given pictures, what was drawn, and the correct rendering, side by side."""
    pictures = [*(draw(picture) for picture in given), _or_missing(one.picture), draw(Picture(one.wanted))]
    why = "" if correct else "Drew nothing." if one.picture is None else _mistakes(one)
    return PictureCard(pictures, title, why, correct, labels=[*labels, "drawn", "correct"])


def _mistakes(one: Drawn) -> str:
    """What the judge reads instead of what was wanted."""
    reading = one.reading
    if reading is None or reading.scene is None:
        return f"The judge cannot read it: {reading.reason.partition(';')[0] if reading is not None else 'nothing drawn'}."
    return f"The judge reads: {caption(reading.scene) if reading.scene.objects else 'an empty scene'}."


def drawings(subject: Subject, shown: int = 9) -> list[Block]:
    """Prompt to drawing, beside a correct rendering; trained combinations and held-out ones."""
    blocks: list[Block] = [Heading("Drawing from a caption")]
    for held_out, words in (
        (False, "Prompts of test scenes. Beside each drawing a correct rendering: jitter of a pixel apart, they should look alike."),
        (True, "Colour-shape pairs that no drawing of the training set shows."),
    ):
        scenes = caption_scenes(shown if not held_out else max(1, shown // 3), SHOWN_SEED, held_out=held_out)
        drawn = draw_captions(subject, scenes, [caption(scene) for scene in scenes])
        cards = [_card(one, f"“Generate an image of {caption(one.wanted)}.”", one.exact) for one in drawn]
        blocks += [Paragraph(words), ImageGrid(cards, cell=15)]
    return blocks


def reconstructions(subject: Subject, shown: int = 6) -> list[Block]:
    """Real pictures through encoder and decoder: what drawing could at best look like."""
    rules = SceneRules("test", use="any")
    scenes = [sample_scene(np.random.default_rng([SHOWN_SEED, 1, index]), rules) for index in range(shown)]
    drawn = judge(subject, scenes, list(subject.encode([Picture(scene) for scene in scenes])))
    words = (
        "Real pictures, encoded to visual tokens and decoded again, without the language model. An error here is the decoder's; "
        "a drawing that is wrong where reconstructions are right is the language model's error."
    )
    cards = [replace(_card(one, caption(one.wanted), one.exact), labels=("decoded", "real")) for one in drawn]
    return [Heading("The decoder's bound"), Paragraph(words), ImageGrid(cards, cell=15)]


def conversation(subject: Subject) -> list[Block]:
    """An interleaved conversation: asked about a picture, asked to draw, asked about the drawing through its visual tokens."""
    rng = np.random.default_rng([SHOWN_SEED, 2])
    seen = sample_scene(rng, SceneRules("test", min_objects=2))
    wanted = sample_scene(rng, SceneRules("test", use="drawn", max_objects=1))
    first, last = ask_colour(seen, rng), ask_shape(wanted, rng)
    turns = [
        Message.user(draw(Picture(seen)), first.text if first is not None else "How many objects are there?"),
        Message.user(f"Draw {caption(wanted)}."),
        Message.user(last.text if last is not None else "What is the background?"),
    ]
    history: list[Message] = []
    for turn in turns:
        answer = subject.answer([[*history, turn]])[0]
        said = answer.message if answer.message.text.strip() or answer.message.images else Message("assistant", (TextPart("(nothing)"),))
        history += [turn, said]
    tokens = [part.visual_tokens for message in history for part in message.images if part.visual_tokens is not None]
    drawn = [_or_missing(picture) for picture in subject.decode(tokens)]
    words = "The last question is about the model's own drawing: it reads the visual tokens that it predicted, not the pixels."
    if not history[3].images:  # the answer to the request
        words = "Asked to draw, the model drew nothing; the last question has no drawing to be about."
    return [Heading("A conversation"), Conversation(history, drawn, words)]


def _rows_shown(subject: Subject, rows: Sequence[Row], labels: Sequence[str]) -> list[PictureCard]:
    """Replies to rows that end in a picture."""
    answers = subject.answer([to_messages(row)[:-1] for row in rows])
    drawn = judge(subject, [row.pictures("assistant")[-1].scene for row in rows], [last_picture(answer) for answer in answers])
    asked = ["".join(part for part in row.turns[0][1] if isinstance(part, str)) for row in rows]
    return [_card(one, f"“{words}”", one.exact, row.pictures("user"), labels) for one, row, words in zip(drawn, rows, asked, strict=True)]


def edits_and_frames(subject: Subject, shown: int = 4) -> list[Block]:
    """Image-to-image edits, and the next frame of clips."""
    changed = [edit(np.random.default_rng([SHOWN_SEED, 3, index]), "test") for index in range(shown)]
    clips = [next_frame(np.random.default_rng([SHOWN_SEED, 4, index]), "test") for index in range(shown)]
    return [
        Heading("Editing a picture"),
        ImageGrid(_rows_shown(subject, changed, ("given",)), cell=18),
        Heading("Predicting a frame"),
        ImageGrid(_rows_shown(subject, clips, ("frame 1", "frame 2")), cell=22),
    ]


def thoughts(subject: Subject, shown: int = 4) -> list[Block]:
    """Visual thinking: the crop that the model draws before it answers."""
    rows = [thinking(np.random.default_rng([SHOWN_SEED, 5, index]), "test", always_asked=True) for index in range(shown)]
    answers = subject.answer([to_messages(row)[:-1] for row in rows])
    crops = subject.decode([last_picture(answer) for answer in answers])
    cards = []
    for row, answer, crop in zip(rows, answers, crops, strict=True):
        question = next(part for part in row.turns[0][1] if isinstance(part, str))
        truth, said = str(row.turns[-1][1][-1]), final_text(answer)
        pictures = [draw(row.pictures("user")[0]), _or_missing(crop), draw(row.pictures("assistant")[-1])]
        reply = " ".join(getattr(part, "text", "[its thought]").strip() for part in answer.message.parts)
        text = f"says “{reply}”; the truth is “{truth}”"
        cards.append(PictureCard(pictures, f"“{question}”", text, said == truth, ("given", "its thought", "true crop")))
    words = "Before it answers, the model draws the part of the picture that it is asked about. A tick is for the answer."
    return [Heading("Thinking visually"), Paragraph(words), ImageGrid(cards, cell=18)]


def named_things(subject: Subject, shown: int = 3) -> list[Block]:
    """Things drawn by their invented names, for each group of names."""
    blocks: list[Block] = [
        Heading("Things with names"),
        Paragraph("Invented names stand for a shape, colour and marking. A tick: the named thing has all three, in its place."),
    ]
    for group in GROUPS:
        rng = np.random.default_rng([SHOWN_SEED, 6, GROUPS.index(group)])
        names = [choose(rng, in_group(group)) for _ in range(shown)]
        # Up to two objects: some names have no test scene in which they stand alone.
        scenes = [sample_named_scene(rng, named, SceneRules("test", use="drawn", max_objects=2)) for named in names]
        things = [next(o for o in scene.objects if o.look == named.look) for scene, named in zip(scenes, names, strict=True)]
        texts = [caption(scene, names={o.cell: named.name}) for scene, o, named in zip(scenes, things, names, strict=True)]
        cards = []
        for one, thing, text in zip(draw_captions(subject, scenes, texts), things, texts, strict=True):
            right = all(one.matches(thing, ("shape", "colour", "marking")))
            cards.append(_card(one, f"“Generate an image of {text}.”", right))
        blocks += [Heading(_GROUP_WORDS[group], 3), ImageGrid(cards, cell=15)]
    return blocks


def sample_blocks(subject: Subject, few: bool = False) -> list[Block]:
    """All of the above; `few` shows the least of each."""
    if few:
        return [
            *questions(subject, 13, 2),
            *drawings(subject, 2),
            *reconstructions(subject, 1),
            *conversation(subject),
            *edits_and_frames(subject, 1),
            *thoughts(subject, 1),
            *named_things(subject, 1),
        ]
    return [
        *questions(subject),
        *drawings(subject),
        *reconstructions(subject),
        *conversation(subject),
        *edits_and_frames(subject),
        *thoughts(subject),
        *named_things(subject),
    ]
