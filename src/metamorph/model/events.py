"""What happens while an answer is generated, as typed events, and how an answer is put together from them.

Axes: k visual tokens per image, v visual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metamorph.messages import ImagePart, Message, Part, TextPart
from metamorph.model.state import FinishReason, Vocabulary

if TYPE_CHECKING:
    from metamorph.model.generation import Emission


@dataclass(frozen=True)
class TextDelta:
    """Some more text. It never ends inside a character; the deltas of a run of text join to that text."""

    text: str


@dataclass(frozen=True)
class ImageStart:
    """The model has begun to draw."""

    index: int  # number of the image in this answer, from 0


@dataclass(frozen=True, eq=False)
class VisualToken:
    """One visual token of the image being drawn, as predicted (normalised if the model normalises)."""

    index: int
    position: int  # in raster order, from 0
    token: Float[Tensor, " v"] = field(repr=False)


@dataclass(frozen=True, eq=False)
class ImageEnd:
    """An image is complete."""

    index: int
    visual_tokens: Float[Tensor, "k v"] = field(repr=False)


@dataclass(frozen=True)
class End:
    """The answer is over: the model ended its turn ("eos"), or had to stop ("length": `max_new_tokens`; "context": the LLM's)."""

    reason: FinishReason
    token_ids: tuple[int, ...] = ()  # every text token said, the special ones and the stop token among them


Event: TypeAlias = TextDelta | ImageStart | VisualToken | ImageEnd | End


@dataclass(frozen=True, eq=False)
class Answer:
    """One generated answer."""

    message: Message  # its image parts hold visual tokens
    token_ids: tuple[int, ...]  # every text token said, the special ones and the stop token among them
    reason: FinishReason
    events: tuple[Event, ...] = field(repr=False)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Answer:
        """The answer that the events tell; the last of them is `End`."""
        end = events[-1]
        assert isinstance(end, End)
        return cls(message_of(events), end.token_ids, end.reason, tuple(events))

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return self.message.text

    @property
    def visual_tokens(self) -> tuple[Float[Tensor, "k v"], ...]:
        """The visual tokens of each image that was drawn, in order."""
        return tuple(part.visual_tokens for part in self.message.images if part.visual_tokens is not None)


class Detokenizer:
    """Turns ids into text piece by piece, holding back bytes that do not yet make a character.

    Some tokenizers render an id differently at the start of a text (a leading space, for instance), so each piece is the difference
    between two decodings that begin at the same earlier id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # both decodings begin here
        self._shown = 0  # ids before this one are in the text already given out

    def push(self, token_id: int) -> str:
        """Take one id; return the text that has become certain, often empty inside a multi-byte character."""
        self._ids.append(token_id)
        shown, text = self._decode(self._start, self._shown), self._decode(self._start, len(self._ids))
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(shown):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]

    def flush(self) -> str:
        """The text still held back, broken characters as U+FFFD; the next id begins a new text."""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._shown)) :]
        self._ids, self._start, self._shown = [], 0, 0
        return rest

    def _decode(self, start: int, stop: int) -> str:
        text = self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one list of ids, one string
        return text


class EventWriter:
    """Writes one row's events from what its steps emitted. Keep one for each answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self._text = Detokenizer(tokenizer)
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._num_images = 0
        self._tokens: list[Float[Tensor, " v"]] = []  # of the image being drawn

    def write(self, emission: Emission) -> list[Event]:
        """The events of one step of this row, in order."""
        if emission.token_id is not None:
            self._ids.append(emission.token_id)
        events: list[Event]
        if emission.visual_token is not None:
            events = self._draw(emission.visual_token)
        elif emission.token_id == self._vocabulary.image_start_id:
            events = [*self._flush(), ImageStart(self._num_images)]
            self._num_images += 1
        elif emission.token_id == self._vocabulary.image_end_id:
            events = []  # ImageEnd was written with the last visual token
        else:
            text = self._text.push(self._ids[-1])
            events = [TextDelta(text)] if text else []
        return [*events, *self._flush(), End(emission.finished, tuple(self._ids))] if emission.finished else events

    def _draw(self, token: Float[Tensor, " v"]) -> list[Event]:
        index = self._num_images - 1
        self._tokens.append(token)
        events: list[Event] = [VisualToken(index, len(self._tokens) - 1, token)]
        if len(self._tokens) == self._vocabulary.num_visual_tokens:
            events.append(ImageEnd(index, torch.stack(self._tokens)))
            self._tokens = []
        return events

    def _flush(self) -> list[Event]:
        rest = self._text.flush()
        return [TextDelta(rest)] if rest else []


def message_of(events: Iterable[Event]) -> Message:
    """The assistant's message that the events tell: runs of text, and images as visual tokens."""
    parts: list[Part] = []
    text = ""
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        if isinstance(event, (ImageStart, End)) and text:
            parts.append(TextPart(text))
            text = ""
        if isinstance(event, ImageEnd):
            parts.append(ImagePart(visual_tokens=event.visual_tokens))
    if text:
        parts.append(TextPart(text))
    return Message("assistant", tuple(parts))
