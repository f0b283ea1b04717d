"""The whole state of a generation as one value: rows in different modes, their cache, and how rows join and leave.

A generation step (`generation.step`) maps a `GenerationState` to the next one and changes nothing in place, so that a state can be
kept, replayed, merged with another or thrown away. Rows are independent: what a row says depends on its prompt, options and seed only.

    text ──<image_start>──> image ──k visual tokens──> image_end ──<image_end>──> text ── ... ──> finished

Axes: b rows, t cached positions (left-padded: every row ends at the last column), d LLM width.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from metamorph.errors import ConfigError
from metamorph.model.cache import layers_of, with_layers

Mode = Literal["text", "image", "image_end"]
"""What a row says next: a text token; a visual token; or, after the last visual token, what follows an image."""

FinishReason = Literal["eos", "length", "context"]
"""The model ended its turn; `max_new_tokens` are spent; or the context of the LLM is full."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How one answer is decoded. Nothing here says *what* to produce: the model decides, an option may only restrict it.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 256  # positions: text tokens, visual tokens, <image_start> and <image_end> all count
    max_images: int = 4  # images that one answer may begin
    allow_images: bool = True  # False: the answer is text only
    begin_with_image: bool = False  # True: the first token is <image_start>
    force_image_end: bool = True  # False: after k visual tokens the text head is free to say something other than <image_end>
    temperature: float = 0.0  # 0: greedy; top_k and top_p then have no effect
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0  # on the text said in this answer; special tokens are exempt

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "max_images": (self.max_images >= 0, "at least 0"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number of at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "None or at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "None or a number above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a finite number above 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} but {expected} is needed (decoding options). Correct the value.")
        if self.begin_with_image and not (self.allow_images and self.max_images):
            raise ConfigError("begin_with_image=True but images are not allowed (decoding options). Set allow_images and max_images >= 1.")

    def updated(self, **changes: Any) -> DecodingOptions:
        """These options with some values changed.

        Raises:
            ConfigError: an unknown name, with the nearest known one, or a value out of range.
        """
        known = [option.name for option in fields(self)]
        for name in changes:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                remedy = f"Did you mean {nearest[0]}?" if nearest else "Remove it."
                raise ConfigError(f"option {name!r} but only {', '.join(known)} are known (decoding options). {remedy}")
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What model and tokenizer fix for every answer: the ids with a meaning, and the sizes that limit an answer."""

    image_token_id: int  # the placeholder, never said
    image_start_id: int
    image_end_id: int
    stop_ids: frozenset[int]  # each ends the answer
    special_ids: tuple[int, ...]  # exempt from the repetition penalty
    size: int  # ids from here on are rows of the embedding matrix without a token
    num_visual_tokens: int  # k
    context: int  # positions that the LLM can hold


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One row of a generation: whose it is, what was asked for, and where it stands."""

    key: int  # chosen by the caller; unique among the rows that live together
    options: DecodingOptions
    seed: int
    num_prompt: int  # positions of the prompt
    mode: Mode = "text"
    num_new: int = 0  # positions generated so far
    num_images: int = 0  # images begun so far
    num_visual: int = 0  # visual tokens said of the current image
    text_ids: tuple[int, ...] = ()  # ids said so far, <image_start> and <image_end> among them, visual tokens not
    finished: FinishReason | None = None

    @property
    def position(self) -> int:
        """Position (from 0) of the element to be said next."""
        return self.num_prompt + self.num_new

    def positions_left(self, vocabulary: Vocabulary) -> int:
        """How many more positions both `max_new_tokens` and the context allow."""
        return min(self.options.max_new_tokens - self.num_new, vocabulary.context - self.position)

    def may_begin_image(self, vocabulary: Vocabulary) -> bool:
        """Whether an image is allowed here and would be complete: <image_start>, k visual tokens and <image_end> still fit."""
        wanted = self.options.allow_images and self.num_images < self.options.max_images
        return wanted and self.positions_left(vocabulary) >= vocabulary.num_visual_tokens + 2

    def forced_token(self, vocabulary: Vocabulary) -> int | None:
        """The token that this row must say now, if there is no choice."""
        if self.mode == "image_end" and self.options.force_image_end:
            return vocabulary.image_end_id
        return vocabulary.image_start_id if self.options.begin_with_image and self.num_new == 0 else None

    def after_token(self, token_id: int, vocabulary: Vocabulary) -> Slot:
        """The slot once it has said a text token."""
        begins = token_id == vocabulary.image_start_id
        said = replace(
            self,
            mode="image" if begins else "text",
            num_new=self.num_new + 1,
            num_images=self.num_images + begins,
            num_visual=0,
            text_ids=(*self.text_ids, token_id),
        )
        return replace(said, finished="eos") if token_id in vocabulary.stop_ids else said._unless_full(vocabulary)

    def after_visual_token(self, vocabulary: Vocabulary) -> Slot:
        """The slot once it has said a visual token."""
        complete = self.num_visual + 1 == vocabulary.num_visual_tokens
        said = replace(self, mode="image_end" if complete else "image", num_new=self.num_new + 1, num_visual=self.num_visual + 1)
        return said._unless_full(vocabulary)

    def _unless_full(self, vocabulary: Vocabulary) -> Slot:
        if self.num_new >= self.options.max_new_tokens:
            return replace(self, finished="length")
        return replace(self, finished="context") if self.position >= vocabulary.context else self


@dataclass(frozen=True, kw_only=True)
class GenerationState:
    """Everything that the next step depends on. Between steps `hidden` is known and nothing has been chosen from it yet.

    `cache` holds t positions of every row; `attention_mask` tells which of them are the row's own. A row's first real column differs
    from row to row, its positions (for rotary or learned embeddings) count from its own start: `slots[i].position`.
    """

    slots: tuple[Slot, ...]
    vocabulary: Vocabulary
    hidden: Float[Tensor, "b d"]  # the state after each row's last element: it predicts the next one
    attention_mask: Bool[Tensor, "b t"]
    cache: DynamicCache = field(repr=False)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.slots)

    @property
    def finished(self) -> bool:
        """Whether no row has anything left to say."""
        return all(slot.finished is not None for slot in self.slots)


def join(first: GenerationState, second: GenerationState) -> GenerationState:
    """Both states' rows in one state, first's before second's; the shorter cache is padded on the left.

    Raises:
        ConfigError: a key occurs in both, or the states are of different models.
    """
    shared = {slot.key for slot in first.slots} & {slot.key for slot in second.slots}
    if shared:
        raise ConfigError(f"keys {sorted(shared)} in both states but keys must differ (joining rows). Give the new rows other keys.")
    if first.vocabulary != second.vocabulary or len(first.cache) != len(second.cache):
        raise ConfigError("two states of different models but rows of one model are needed (joining rows). Keep one state for each model.")
    length = max(first.attention_mask.shape[1], second.attention_mask.shape[1])
    pads = [length - state.attention_mask.shape[1] for state in (first, second)]
    states = list(zip((first, second), pads, strict=True))
    layers = [
        tuple(
            torch.cat([F.pad(pair[side], (0, 0, pad, 0)) for pair, pad in zip(pairs, pads, strict=True)])
            for side in (0, 1)  # keys, values "b heads t width"
        )
        for pairs in zip(layers_of(first.cache), layers_of(second.cache), strict=True)
    ]
    return GenerationState(
        slots=first.slots + second.slots,
        vocabulary=first.vocabulary,
        hidden=torch.cat([first.hidden, second.hidden]),
        attention_mask=torch.cat([F.pad(state.attention_mask, (pad, 0)) for state, pad in states]),
        cache=with_layers(first.cache, layers),
    )


def keep_rows(state: GenerationState, rows: Sequence[int]) -> GenerationState:
    """Only the rows with these indices, in this order; the others leave. Columns that no remaining row uses are dropped."""
    index = torch.tensor(rows, dtype=torch.long, device=state.hidden.device)
    mask = state.attention_mask[index]
    used = mask.any(dim=0)
    first_column = int(used.int().argmax()) if len(rows) else mask.shape[1]
    layers = [(keys[index, :, first_column:], values[index, :, first_column:]) for keys, values in layers_of(state.cache)]
    return replace(
        state,
        slots=tuple(state.slots[row] for row in rows),
        hidden=state.hidden[index],
        attention_mask=mask[:, first_column:],
        cache=with_layers(state.cache, layers),
    )


def drop_finished(state: GenerationState) -> GenerationState:
    """The state without the rows that have finished; the same object if there are none."""
    rows = [row for row, slot in enumerate(state.slots) if slot.finished is None]
    return state if len(rows) == len(state) else keep_rows(state, rows)
