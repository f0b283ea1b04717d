"""An example as a sequence of tokens: the processor, the limit of length, and what happens to conversations that are longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from metamorph.batch import TokenSequence
from metamorph.errors import ContextLengthError
from metamorph.messages import Example, Message, validate_messages


@runtime_checkable
class EncodesMessages(Protocol):
    """What is needed of a processor."""

    def encode(self, messages: Sequence[Message], *, max_length: int | None, id: str, source: str, weight: float) -> TokenSequence:
        """The conversation as a token sequence, or a ContextLengthError."""
        ...


@dataclass(frozen=True)
class ExampleEncoder:
    """The usual `encode` of a stream: a processor applied to an example, whose weight goes with the sequence.

    Args:
        processor: makes the sequence, its images expanded.
        max_length: positions that a sequence may have.
        too_long: what happens to a longer conversation. "refuse": it is an error. "cut_turns": it loses its last turns, as few as possible,
            until it fits; what is left ends with the assistant. A turn is never cut, nor an image in it. The sequence says
            how many it lost.
    """

    processor: EncodesMessages
    max_length: int | None = None
    too_long: Literal["refuse", "cut_turns"] = "refuse"

    def __call__(self, example: Example) -> TokenSequence:
        """Encode.

        Raises:
            RecordError, MediaError: the example is malformed, holds no answer, or an image is broken.
            ContextLengthError: it is longer than `max_length`, or its first answer ends beyond it.
        """
        validate_messages(example.messages, example.place, needs_answer=True)
        ends = [number for number, message in enumerate(example.messages, 1) if message.role == "assistant"]
        whole = len(example.messages)
        kept = [whole] if self.too_long == "refuse" else list(dict.fromkeys([whole, *reversed(ends)]))
        for end in kept:
            try:
                sequence = self._encode(example, example.messages[:end])
                return sequence if end == whole else replace(sequence, turns_cut=whole - end)
            except ContextLengthError:
                if end == kept[-1]:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _encode(self, example: Example, messages: Sequence[Message]) -> TokenSequence:
        return self.processor.encode(messages, max_length=self.max_length, id=example.id, source=example.source, weight=example.weight)
