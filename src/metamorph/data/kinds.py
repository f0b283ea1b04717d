"""The six kinds of VPiT data (paper section 5), each a pure function `row, rng -> Example` that knows no file format.

    ImageQA         image_qa         image(s) + question -> text              kind "image_qa" ("text" where a row has no image)
    Generation      generation       a request -> words + image               kind "generation"
    VideoQA         video_qa         frames + question -> text                kind "video_qa"
    PureVideo       pure_video       frames -> frames (or their interval)     kind "frames"
    VisualThinking  visual_thinking  image + question -> words + key picture + answer    kind "thinking"
    ImageToImage    image_to_image   image + instruction -> image             kind "edit"

Images are whatever an `ImagePart` takes: a path (complete: the reader has checked it against its root), bytes of a file, or PIL.
All choices come from `rng`, and all wording from `Phrasings`. What is blank is refused, never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamorph.data.frames import VARIANTS, Variant, frame_messages, plan_frames, possible_variants
from metamorph.data.phrasings import DEFAULT, Phrasings, Wording
from metamorph.data.regions import PADDING, Box, NamedBox, crop_region, draw_boxes
from metamorph.errors import RecordError
from metamorph.messages import Example, ImagePart, ImageSource, Message, Part, TextPart, VideoPart

ASKED_SHARE = 0.5
"""How often a question asks for visual thinking; the paper has it with and without, its share is not known."""


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """What rows of all kinds have: an id, the name of the data set, and file and line, if known."""

    id: str
    source: str
    origin: str = ""  # "train.jsonl:812"

    @property
    def place(self) -> str:
        """How errors name the row."""
        return self.origin or f"{self.source}:{self.id}"


@dataclass(frozen=True)
class Turn:
    """A question and its answer. Without a question (None) the answer is a description, and a request for one is drawn."""

    question: str | None
    answer: str


@dataclass(frozen=True, kw_only=True)
class ImageQA(KindRow):
    """Questions about images, which are all shown before the first. Rows of plain text, as some data sets mix in, have none."""

    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Generation(KindRow):
    """An image and its caption."""

    image: ImageSource
    caption: str


@dataclass(frozen=True, kw_only=True)
class VideoQA(KindRow):
    """Questions about the frames of a video, taken `fps` times a second."""

    frames: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    fps: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class PureVideo(KindRow):
    """Frames of a video, `interval` seconds apart (None: not known)."""

    frames: tuple[ImageSource, ...]
    interval: float | None = None


@dataclass(frozen=True, kw_only=True)
class VisualThinking(KindRow):
    """A question about an image, and what to look at: a region to be cut out, objects to be boxed and named, or a picture of its own."""

    image: ImageSource
    question: str
    answer: str
    key: Box | tuple[NamedBox, ...] | ImageSource


@dataclass(frozen=True, kw_only=True)
class ImageToImage(KindRow):
    """An image before and after an instruction was followed."""

    source_image: ImageSource
    target_image: ImageSource
    instruction: str


def image_qa(row: ImageQA, rng: np.random.Generator, phrasings: Phrasings = DEFAULT) -> Example:
    """Images and a question, then an answer; more questions and answers may follow.

    Raises:
        RecordError: no turns, a blank question or answer, or nothing to describe.
    """
    shown = tuple(ImagePart(image) for image in row.images)
    describe = phrasings.image_qa.describe if shown else None
    return _example(row, "image_qa" if shown else "text", *_dialogue(row, shown, row.turns, rng, describe))


def generation(row: Generation, rng: np.random.Generator, phrasings: Phrasings = DEFAULT) -> Example:
    """A request with a caption, then a few words and the image.

    Raises:
        RecordError: the caption is blank.
    """
    request = phrasings.generation.request.draw(rng, caption=_text(row.caption, "caption", row))
    reply = phrasings.generation.reply.draw(rng)
    return _example(row, "generation", Message.user(request), Message.assistant(reply, ImagePart(row.image)))


def video_qa(row: VideoQA, rng: np.random.Generator, phrasings: Phrasings = DEFAULT) -> Example:
    """Frames and a question, then an answer; more questions and answers may follow.

    Raises:
        RecordError: no frames, no turns, or a blank question or answer.
    """
    if not row.frames:
        raise RecordError(f"0 frames but at least 1 is needed ({row.place}). Leave the row out or sample its video more densely.")
    video = VideoPart(tuple(ImagePart(frame) for frame in row.frames), fps=row.fps)
    return _example(row, "video_qa", *_dialogue(row, (video,), row.turns, rng, phrasings.video_qa.describe))


def pure_video(
    row: PureVideo, rng: np.random.Generator, phrasings: Phrasings = DEFAULT, *, variants: Sequence[Variant] = VARIANTS
) -> Example:
    """Some frames are shown, others asked for, by one of the variants for which the clip is long enough (all equally likely).

    Raises:
        RecordError: the clip is too short for all of them, or its interval is not above 0.
    """
    if row.interval is not None and not 0 < row.interval < float("inf"):
        raise RecordError(f"an interval of {row.interval} seconds but a number above 0 is needed ({row.place}). Correct or drop it.")
    possible = possible_variants(len(row.frames), has_interval=row.interval is not None, variants=variants)
    if not possible:
        known = "a known" if row.interval is not None else "no known"
        raise RecordError(
            f"{len(row.frames)} frame(s) and {known} interval but none of the variants {', '.join(variants)} can be made of that "
            f"({row.place}). Sample the clip more densely or leave it out."
        )
    variant = possible[int(rng.integers(len(possible)))]
    plan = plan_frames(variant, len(row.frames), rng)
    return _example(row, "frames", *frame_messages(plan, row.frames, row.interval, rng, phrasings.frames))


def visual_thinking(
    row: VisualThinking,
    rng: np.random.Generator,
    phrasings: Phrasings = DEFAULT,
    *,
    asked_share: float = ASKED_SHARE,
    padding: float = PADDING,
) -> Example:
    """An image and a question, with or without a phrase that asks to think visually; then words, the key picture, and the answer.

    Args:
        row: a question and where to look.
        rng: makes all choices.
        phrasings: the wording.
        asked_share: how often the phrase is there.
        padding: how much wider than its box a key region is cut; see `crop_region`.

    Raises:
        RecordError: a blank question or answer, or a box that is empty or outside the image.
        MediaError: the image must be opened to cut or mark it, and cannot be.
    """
    question = _text(row.question, "question", row)
    asked = rng.random() < asked_share
    request = phrasings.thinking.request.draw(rng)
    if isinstance(row.key, Box):
        reply, key = phrasings.thinking.reply.draw(rng), crop_region(row.image, row.key, padding=padding, place=row.place)
    elif isinstance(row.key, tuple):
        key = draw_boxes(row.image, row.key, place=row.place)
        reply = phrasings.thinking.marked_reply.draw(rng, names=_enumerate(row.key))
    else:
        reply, key = phrasings.thinking.reply.draw(rng), row.key
    said = f"{question} {request}" if asked else question
    answer = Message.assistant(reply, ImagePart(key), _text(row.answer, "answer", row))
    return _example(row, "thinking", Message.user(ImagePart(row.image), said), answer)


def image_to_image(row: ImageToImage, rng: np.random.Generator, phrasings: Phrasings = DEFAULT) -> Example:
    """An image and an instruction, then the changed image.

    Raises:
        RecordError: the instruction is blank.
    """
    request = phrasings.edit.request.draw(rng, instruction=_text(row.instruction, "instruction", row))
    reply = phrasings.edit.reply.draw(rng)
    said = (reply,) if reply.strip() else ()
    asked = Message.user(ImagePart(row.source_image), request)
    return _example(row, "edit", asked, Message.assistant(*said, ImagePart(row.target_image)))


def _dialogue(
    row: KindRow, shown: tuple[Part, ...], turns: tuple[Turn, ...], rng: np.random.Generator, describe: Wording | None
) -> list[Message]:
    """Questions and answers in turn; what is shown stands before the first question."""
    if not turns:
        raise RecordError(f"0 turns but at least 1 question and answer are needed ({row.place}). Leave the row out.")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if turn.question is not None:
            question = _text(turn.question, "question", row)
        elif describe is not None:
            question = describe.draw(rng)
        else:
            raise RecordError(f"no question and no image but one of them is needed ({row.place}). Give the row a question.")
        messages.append(Message("user", (*(shown if number == 0 else ()), TextPart(question))))
        messages.append(Message.assistant(_text(turn.answer, "answer", row)))
    return messages


def _example(row: KindRow, kind: str, *messages: Message) -> Example:
    return Example(messages, id=row.id, source=row.source, kind=kind, origin=row.origin)


def _text(value: str, name: str, row: KindRow) -> str:
    """The text without blanks around it."""
    if not value.strip():
        raise RecordError(f"a blank {name} but some text is needed ({row.place}). Leave the row out or fill it in.")
    return value.strip()


def _enumerate(objects: Sequence[NamedBox]) -> str:
    """Names once each, as a sentence has them: "dog", "dog and ball", "dog, ball and tree"."""
    names = list(dict.fromkeys(item.name.strip() for item in objects))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
