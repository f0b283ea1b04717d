"""How many positions a conversation takes once its images are expanded, and what a limit would cut off: counted, or estimated.

A count comes from a processor (passed in: nothing here knows a model); pixels are not needed for it, so no image is opened.

Axes: k visual tokens per image, n images in reading order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from metamorph.messages import Example, ImagePart, Message, Part, TextPart, VideoPart

if TYPE_CHECKING:
    from metamorph.batch import TokenSequence

Span = tuple[int, int]
"""Positions from the first number up to, not including, the second."""

UNLIMITED = 2**62  # positions: the processor is to count, not to refuse
_TURN, _MARKERS = 4, 2  # positions of a turn's role and end in common chat templates; of <image_start> and <image_end>
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Lengths:
    """Positions of one conversation."""

    positions: int
    images: tuple[Span, ...]  # with their markers
    is_target: tuple[bool, ...]  # of each image: spoken by the assistant
    text_targets: tuple[Span, ...]
    tokens_per_image: int

    @property
    def num_text_targets(self) -> int:
        """Positions whose token is a target."""
        return sum(end - start for start, end in self.text_targets)

    @property
    def num_visual_targets(self) -> int:
        """Visual tokens that are targets."""
        return sum(self.is_target) * self.tokens_per_image

    def text_targets_from(self, position: int) -> int:
        """Text targets at or behind a position: what a cut there would lose."""
        return sum(max(0, end - max(start, position)) for start, end in self.text_targets)

    def images_cut_at(self, position: int) -> tuple[int, ...]:
        """Numbers of the images that do not end before a position."""
        return tuple(number for number, (_, end) in enumerate(self.images) if end > position)


@runtime_checkable
class Measure(Protocol):
    """Counts the positions of an example."""

    @property
    def how(self) -> str:
        """How, as a report says it."""
        ...

    @property
    def exact(self) -> bool:
        """Whether training will count the same."""
        ...

    def __call__(self, example: Example) -> Lengths:
        """Count.

        Raises:
            MetaMorphError: the conversation cannot be written by the chat template.
        """
        ...


@runtime_checkable
class EncodesText(Protocol):
    """What is needed of a processor."""

    num_visual_tokens: int

    def encode(self, messages: Sequence[Message], *, max_length: int | None, id: str) -> TokenSequence:
        """The conversation as a token sequence."""
        ...


@dataclass(frozen=True)
class CountedLengths:
    """By the processor that training uses; images are replaced by blank visual tokens, so that none is opened."""

    processor: EncodesText
    name: str = ""
    exact: bool = True

    @property
    def how(self) -> str:
        """See Measure."""
        return f"counted with the processor of {self.name or 'the model'}, {self.processor.num_visual_tokens} visual tokens per image"

    def __call__(self, example: Example) -> Lengths:
        """See Measure."""
        import torch

        k = self.processor.num_visual_tokens
        blank = ImagePart(visual_tokens=torch.zeros(k, 1))
        messages = [replace(message, parts=tuple(_without_pixels(part, blank) for part in message.parts)) for message in example.messages]
        return lengths_of(self.processor.encode(messages, max_length=UNLIMITED, id=example.id))


def lengths_of(sequence: TokenSequence) -> Lengths:
    """What a token sequence says about its own positions."""
    from metamorph.batch import IGNORE_INDEX

    k = sequence.tokens_per_image
    visual = sequence.is_visual.nonzero().flatten().tolist()
    images = tuple((visual[first] - 1, visual[first + k - 1] + 2) for first in range(0, len(visual), max(k, 1)))
    targets = (sequence.labels != IGNORE_INDEX).nonzero().flatten().tolist()
    spans = [[position for _, position in run] for _, run in groupby(enumerate(targets), key=lambda pair: pair[1] - pair[0])]
    text = tuple((run[0], run[-1] + 1) for run in spans)
    return Lengths(len(sequence), images, tuple(sequence.visual_targets.tolist()), text, k)


@dataclass(frozen=True)
class EstimatedLengths:
    """Without a processor: a token for every 4 bytes of UTF-8, 4 for each turn, k + 2 for each image."""

    tokens_per_image: int = 64
    exact: bool = False

    @property
    def how(self) -> str:
        """See Measure."""
        return (
            f"estimated: {_BYTES_PER_TOKEN} bytes of text a token, {_TURN} tokens a turn, {self.tokens_per_image} + {_MARKERS} an image; "
            "--recipe or --model counts them"
        )

    def __call__(self, example: Example) -> Lengths:
        """See Measure."""
        position, images, owners, text = 0, [], [], []
        for message in example.messages:
            position += _TURN - 1
            for part in message.parts:
                number = 0 if isinstance(part, TextPart) else len(part.frames) if isinstance(part, VideoPart) else 1
                for _ in range(number):
                    images.append((position, position + self.tokens_per_image + _MARKERS))
                    owners.append(message.role == "assistant")
                    position = images[-1][1]
                if isinstance(part, TextPart):
                    start, position = position, position + -(-len(part.text.encode(errors="replace")) // _BYTES_PER_TOKEN)
                    text += [(start, position)] if message.role == "assistant" else []
            text += [(position, position + 1)] if message.role == "assistant" else []  # the end of the turn
            position += 1
        return Lengths(position, tuple(images), tuple(owners), tuple(text), self.tokens_per_image if images else 0)


def _without_pixels(part: Part, blank: ImagePart) -> Part:
    if isinstance(part, VideoPart):
        return VideoPart((blank,) * len(part.frames), part.fps)
    return blank if isinstance(part, ImagePart) else part
