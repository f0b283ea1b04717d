"""Frame prediction, the variants of pure video: which frames are shown, which are asked for, and the words for it.

Every variant promises exactly what it shows: a plan of frame numbers comes first, and words, shown frames and targets are made from it.

Variants (paper section 5): `forward` (the next 1 to 3 frames), `completion` (the rest of a clip of which at least half is shown),
`reverse` (a clip played backwards goes on backwards), `fill_in` (every other frame), `reorder` (shuffled frames in their order), and
`interval` (the time between frames, as text).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from metamorph.data.phrasings import FramesWording
from metamorph.errors import RecordError
from metamorph.messages import ImagePart, ImageSource, Message, Part, TextPart, VideoPart

Variant: TypeAlias = Literal["forward", "completion", "reverse", "fill_in", "reorder", "interval"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

MIN_FRAMES: Mapping[Variant, int] = {"forward": 2, "completion": 2, "reverse": 2, "fill_in": 3, "reorder": 3, "interval": 2}
"""Fewest frames of a clip with which a variant has something to show and something to ask."""

MAX_PREDICTED = 3
"""Most frames that `forward` and `reverse` ask for."""

MAX_SHUFFLED = 8
"""Most frames that `reorder` shuffles. It shows every frame twice, and a context of 4,096 tokens holds 62 images; the number is ours."""


@dataclass(frozen=True)
class FramePlan:
    """Numbers of frames of a clip, in the order in which they are shown and asked for."""

    variant: Variant
    shown: tuple[int, ...]
    asked: tuple[int, ...]


def possible_variants(num_frames: int, *, has_interval: bool, variants: Sequence[Variant] = VARIANTS) -> tuple[Variant, ...]:
    """The variants for which a clip is long enough; `interval` needs to know the time between its frames, too."""
    return tuple(
        variant for variant in variants if num_frames >= MIN_FRAMES[variant] and (variant != "interval" or has_interval)
    )  # fmt: skip


def plan_frames(variant: Variant, num_frames: int, rng: np.random.Generator) -> FramePlan:
    """Which frames a variant shows and asks for.

    Raises:
        RecordError: the clip is too short for it.
    """
    if num_frames < MIN_FRAMES[variant]:
        raise RecordError(f"{num_frames} frames but at least {MIN_FRAMES[variant]} are needed (variant {variant!r}). Give a longer clip.")
    shown, asked = _PLANS[variant](num_frames, rng)
    return FramePlan(variant, tuple(shown), tuple(asked))


def frame_messages(
    plan: FramePlan, frames: Sequence[ImageSource], interval: float | None, rng: np.random.Generator, wording: FramesWording
) -> tuple[Message, Message]:
    """The plan as a conversation.

    Args:
        plan: which frames are shown and asked for.
        frames: the clip, in the order of time.
        interval: seconds between two frames of it, if known.
        rng: chooses the words.
        wording: the sentences to choose from.

    Raises:
        RecordError: the interval is asked for but not known.
    """
    shown = _shown(plan, frames, interval)
    counts = {"shown": count_frames(len(plan.shown)), "asked": count_frames(len(plan.asked))}
    if plan.variant == "interval":
        if interval is None:
            raise RecordError("no interval but seconds between frames are needed (variant 'interval'). Give the clip's interval.")
        question = wording.interval_question.draw(rng, shown=counts["shown"])
        answer = wording.interval_answer.draw(rng, interval=spell_seconds(interval))
        return Message("user", (*shown, TextPart(question))), Message.assistant(answer)
    request = getattr(wording, plan.variant).draw(rng, **counts)
    return Message("user", (*shown, TextPart(request))), Message.assistant(*(ImagePart(frames[number]) for number in plan.asked))


def count_frames(number: int) -> str:
    """A number of frames with its noun: "1 frame", "4 frames"."""
    return "1 frame" if number == 1 else f"{number} frames"


def spell_seconds(seconds: float) -> str:
    """Seconds to two significant digits, with their noun: "1 second", "0.25 seconds", "12 seconds"."""
    number = f"{float(f'{seconds:.2g}'):g}"
    return "1 second" if number == "1" else f"{number} seconds"


def _shown(plan: FramePlan, frames: Sequence[ImageSource], interval: float | None) -> tuple[Part, ...]:
    """A video where the frames are in the order of time, else single images: a VideoPart promises that order."""
    images = tuple(ImagePart(frames[number]) for number in plan.shown)
    strides = {later - earlier for earlier, later in zip(plan.shown, plan.shown[1:], strict=False)}
    if len(images) > 1 and min(strides) < 0:
        return images
    if interval is None or plan.variant == "interval" or len(strides) != 1:  # an answer is not shown beside its question
        return (VideoPart(images),)
    return (VideoPart(images, fps=1 / (interval * strides.pop())),)


_Numbers: TypeAlias = tuple[Sequence[int], Sequence[int]]


def _forward(n: int, rng: np.random.Generator) -> _Numbers:
    asked = int(rng.integers(1, min(MAX_PREDICTED, n - 1) + 1))
    return range(n - asked), range(n - asked, n)


def _completion(n: int, rng: np.random.Generator) -> _Numbers:
    shown = int(rng.integers((n + 1) // 2, n))
    return range(shown), range(shown, n)


def _reverse(n: int, rng: np.random.Generator) -> _Numbers:
    asked = int(rng.integers(1, min(MAX_PREDICTED, n - 1) + 1))
    return range(n - 1, asked - 1, -1), range(asked - 1, -1, -1)


def _fill_in(n: int, rng: np.random.Generator) -> _Numbers:
    """Of an even number of frames the last is left out, as nothing is shown after it."""
    odd = n if n % 2 else n - 1
    return range(0, odd, 2), range(1, odd, 2)


def _reorder(n: int, rng: np.random.Generator) -> _Numbers:
    """Of a long clip a stretch is taken. Frames that are in order already are drawn again."""
    length = min(n, MAX_SHUFFLED)
    start = int(rng.integers(n - length + 1))
    ordered = list(range(start, start + length))
    shuffled = ordered
    while shuffled == ordered:
        shuffled = [start + int(number) for number in rng.permutation(length)]
    return shuffled, ordered


def _interval(n: int, rng: np.random.Generator) -> _Numbers:
    return range(n), ()


_PLANS: Mapping[Variant, Callable[[int, np.random.Generator], _Numbers]] = {
    "forward": _forward,
    "completion": _completion,
    "reverse": _reverse,
    "fill_in": _fill_in,
    "reorder": _reorder,
    "interval": _interval,
}
