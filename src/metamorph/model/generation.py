"""Generation: batched, cached, interleaved. The model alone decides when it writes and when it draws.

`prefill` reads prompts into a `GenerationState`; `step` makes every row say one more element, a text token or a visual token, whatever
the other rows are doing; `generate` and `stream` run whole answers, letting prompts join as rows leave.

Axes: b rows, r rows of one kind, t positions, n images (flat), k visual tokens per image, v vision width, d LLM width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import DynamicCache

from metamorph.batch import IGNORE_INDEX, Batch, TokenSequence
from metamorph.errors import ConfigError, ContextLengthError
from metamorph.model.cache import fork_cache, new_cache
from metamorph.model.events import Answer, Event, EventWriter
from metamorph.model.modeling import MetaMorph
from metamorph.model.sampling import choose_tokens
from metamorph.model.state import DecodingOptions, FinishReason, GenerationState, Slot, Vocabulary, drop_finished, join

if TYPE_CHECKING:
    from metamorph.model.processing import MetaMorphProcessor

MAX_ROWS = 32
"""Rows that `generate` and `stream` keep in one state unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Emission:
    """What one row said in one step: a text token or a visual token, and whether that ended its answer."""

    key: int
    token_id: int | None = None
    visual_token: Float[Tensor, " v"] | None = None
    finished: FinishReason | None = None


@dataclass(frozen=True, eq=False)
class AnswerIds:
    """One answer without its text."""

    token_ids: tuple[int, ...]  # every text token said, the special ones and the stop token among them
    visual_tokens: tuple[Float[Tensor, "k v"], ...]  # of each image that was completed
    reason: FinishReason

    @classmethod
    def of(cls, emissions: Sequence[Emission], num_visual_tokens: int) -> AnswerIds:
        """The answer that a row's emissions tell; the last of them ends it."""
        reason = emissions[-1].finished
        assert reason is not None
        drawn = [one.visual_token for one in emissions if one.visual_token is not None]
        whole = range(0, len(drawn) - num_visual_tokens + 1, num_visual_tokens)  # an image that was cut short is no image
        images = tuple(torch.stack(drawn[first : first + num_visual_tokens]) for first in whole)
        return cls(tuple(one.token_id for one in emissions if one.token_id is not None), images, reason)


def vocabulary_of(model: MetaMorph, processor: MetaMorphProcessor | None = None) -> Vocabulary:
    """Ids and sizes that limit every answer of this model; without a processor every row of the text head is a token.

    An answer stops at any end-of-sequence id that the generation settings (of the whole or of its LLM), the LLM's config or the
    tokenizer name.
    """
    config, tokenizer = model.config, None if processor is None else processor.tokenizer
    text_config, rows = config.text_config, model.get_output_embeddings().weight.shape[0]
    named = [getattr(model.generation_config, "eos_token_id", None), getattr(model.language_model.generation_config, "eos_token_id", None)]
    named += [getattr(text_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    stop_ids = {int(token) for value in named if value is not None for token in ([value] if isinstance(value, int) else value)}
    if not stop_ids:
        raise ConfigError("0 end-of-sequence ids but at least 1 is needed (generation). Set generation_config.eos_token_id.")
    image_ids = (config.image_token_id, config.image_start_token_id, config.image_end_token_id)
    if None in image_ids:
        raise ConfigError(f"image token ids {image_ids} but 3 ids are needed (config). Make the model with `metamorph init`.")
    known = () if tokenizer is None else tokenizer.all_special_ids
    return Vocabulary(
        image_token_id=config.image_token_id,
        image_start_id=config.image_start_token_id,
        image_end_id=config.image_end_token_id,
        stop_ids=frozenset(stop_ids),
        special_ids=tuple(sorted(number for number in {*known, *stop_ids, *image_ids} if number < rows)),
        size=rows if tokenizer is None else min(len(tokenizer), rows),
        num_visual_tokens=config.num_visual_tokens,
        context=text_config.max_position_embeddings,
    )


@torch.no_grad()
def prefill(
    model: MetaMorph,
    prompts: Sequence[TokenSequence],
    vocabulary: Vocabulary,
    options: DecodingOptions | Sequence[DecodingOptions] = DecodingOptions(),  # noqa: B008  (frozen)
    *,
    seeds: int | Sequence[int] = 0,
    keys: Sequence[int] | None = None,
) -> GenerationState:
    """Read prompts in one left-padded forward; the model must be in eval mode.

    Args:
        model: the model.
        prompts: as the processor encodes them, with a generation prompt.
        vocabulary: from `vocabulary_of`.
        options: for all rows, or one for each.
        seeds: for all rows, or one for each.
        keys: names of the rows, by default 0, 1, ...

    Raises:
        ContextLengthError: a prompt leaves no room for an answer, with its images and positions.
        ConfigError: the numbers of prompts, options, seeds and keys differ, or an image that must be drawn does not fit.
    """
    every_options, every_seed = _one_for_each(prompts, options, seeds)
    every_key = list(range(len(prompts))) if keys is None else list(keys)
    if not prompts or len(set(every_key)) != len(prompts):
        found = f"{len(set(every_key))} different keys but {len(prompts)} prompts"
        raise ConfigError(f"{found} (prefill). Give at least one prompt, and every prompt a key of its own.")
    slots = []
    for prompt, row_options, seed, key in zip(prompts, every_options, every_seed, every_key, strict=True):
        slot = Slot(key=key, options=row_options, seed=seed, num_prompt=len(prompt))
        _check_room(prompt, slot, vocabulary)
        slots.append(slot)
    batch = left_pad(prompts).to(model.device)
    tokens = model.gather_visual_tokens(batch.pixel_values, batch.visual_tokens, batch.from_pixels)
    embeddings = model.embed(batch.input_ids, tokens, batch.is_visual)
    cache = new_cache()
    hidden = _run_decoder(model, embeddings, batch.attention_mask, batch.position_ids, cache)
    return GenerationState(slots=tuple(slots), vocabulary=vocabulary, hidden=hidden, attention_mask=batch.attention_mask, cache=cache)


@torch.no_grad()
def step(model: MetaMorph, state: GenerationState) -> tuple[GenerationState, tuple[Emission, ...]]:
    """Every unfinished row says one more element, in text or image mode; `state` itself is not changed.

    Rows inside an image skip the text head, and their text logits do not exist. Finished rows ride along until `drop_finished`.
    The model must be in eval mode.

    Returns:
        The next state, and one emission for each row that was unfinished.
    """
    vocabulary = state.vocabulary
    drawing = [row for row, slot in enumerate(state.slots) if slot.finished is None and slot.mode == "image"]
    writing = [row for row, slot in enumerate(state.slots) if slot.finished is None and slot.mode != "image"]
    slots, emissions = list(state.slots), {}
    inputs = torch.zeros_like(state.hidden)
    if writing:
        token_ids = _say_tokens(model, state, writing)
        inputs[writing] = model.get_input_embeddings()(torch.tensor(token_ids, device=inputs.device)).to(inputs.dtype)
        for row, token_id in zip(writing, token_ids, strict=True):
            slots[row] = slots[row].after_token(token_id, vocabulary)
            emissions[row] = Emission(slots[row].key, token_id=token_id, finished=slots[row].finished)
    if drawing:
        visual = model.predict_visual_tokens(state.hidden[drawing])
        inputs[drawing] = model.project(visual).to(inputs.dtype)
        for row, token in zip(drawing, visual.float().unbind(), strict=True):
            slots[row] = slots[row].after_visual_token(vocabulary)
            emissions[row] = Emission(slots[row].key, visual_token=token, finished=slots[row].finished)
    positions = [slot.position for slot in state.slots]
    state = replace(state, slots=tuple(slots))
    said = tuple(emissions[row] for row in sorted(emissions))
    return (state if state.finished else _advance(model, state, inputs, positions)), said


def stream(
    model: MetaMorph,
    processor: MetaMorphProcessor,
    prompts: Sequence[TokenSequence],
    options: DecodingOptions | Sequence[DecodingOptions] = DecodingOptions(),  # noqa: B008  (frozen)
    *,
    seeds: int | Sequence[int] = 0,
    max_rows: int = MAX_ROWS,
) -> Iterator[tuple[int, Event]]:
    """Answer prompts; yield (number of the prompt, event) as things happen. The model is in eval mode meanwhile.

    At most `max_rows` prompts are answered at a time; further ones join as soon as half of the rows are free.

    Raises:
        ContextLengthError, ConfigError: as `prefill`.
    """
    vocabulary = vocabulary_of(model, processor)
    writers = [EventWriter(processor.tokenizer, vocabulary) for _ in prompts]
    for emission in _emit(model, vocabulary, prompts, options, seeds, max_rows):
        for event in writers[emission.key].write(emission):
            yield emission.key, event


def generate(
    model: MetaMorph,
    processor: MetaMorphProcessor,
    prompts: Sequence[TokenSequence],
    options: DecodingOptions | Sequence[DecodingOptions] = DecodingOptions(),  # noqa: B008  (frozen)
    *,
    seeds: int | Sequence[int] = 0,
    max_rows: int = MAX_ROWS,
) -> list[Answer]:
    """Answer prompts: one answer for each, in their order. What `stream` tells, collected."""
    events: list[list[Event]] = [[] for _ in prompts]
    for number, event in stream(model, processor, prompts, options, seeds=seeds, max_rows=max_rows):
        events[number].append(event)
    return [Answer.of(told) for told in events]


def generate_ids(
    model: MetaMorph,
    prompts: Sequence[TokenSequence],
    options: DecodingOptions | Sequence[DecodingOptions] = DecodingOptions(),  # noqa: B008  (frozen)
    *,
    seeds: int | Sequence[int] = 0,
    max_rows: int = MAX_ROWS,
) -> list[AnswerIds]:
    """What `generate` does for a model without a tokenizer: answers as ids and visual tokens."""
    vocabulary = vocabulary_of(model)
    said: list[list[Emission]] = [[] for _ in prompts]
    for emission in _emit(model, vocabulary, prompts, options, seeds, max_rows):
        said[emission.key].append(emission)
    return [AnswerIds.of(emissions, vocabulary.num_visual_tokens) for emissions in said]


def _emit(
    model: MetaMorph,
    vocabulary: Vocabulary,
    prompts: Sequence[TokenSequence],
    options: DecodingOptions | Sequence[DecodingOptions],
    seeds: int | Sequence[int],
    max_rows: int,
) -> Iterator[Emission]:
    """What the rows say, step by step; the key of an emission is the number of its prompt."""
    every_options, every_seed = _one_for_each(prompts, options, seeds)
    if max_rows < 1:
        raise ConfigError(f"max_rows={max_rows} but at least 1 is needed (generation). Raise it.")
    waiting, state = deque(range(len(prompts))), None
    was_training = model.training
    model.eval()  # dropout off; and gradient checkpointing, active in training mode only, would leave the cache empty
    try:
        while waiting or state is not None:
            live = 0 if state is None else len(state)
            if waiting and live <= max_rows // 2:
                keys = [waiting.popleft() for _ in range(min(max_rows - live, len(waiting)))]
                chosen = [[values[key] for key in keys] for values in (prompts, every_options, every_seed)]
                arriving = prefill(model, chosen[0], vocabulary, chosen[1], seeds=chosen[2], keys=keys)
                state = arriving if state is None else join(state, arriving)
            assert state is not None
            state, emissions = step(model, state)
            yield from emissions
            state = None if state.finished else drop_finished(state)
    finally:
        model.train(was_training)


def _one_for_each(
    prompts: Sequence[TokenSequence], options: DecodingOptions | Sequence[DecodingOptions], seeds: int | Sequence[int]
) -> tuple[list[DecodingOptions], list[int]]:
    """Options and seed of every prompt, where one may stand for all."""
    count = len(prompts)
    every_options = [options] * count if isinstance(options, DecodingOptions) else list(options)
    every_seed = [seeds] * count if isinstance(seeds, int) else list(seeds)
    if not count == len(every_options) == len(every_seed):
        found = f"{len(every_options)} options and {len(every_seed)} seeds but {count} prompts"
        raise ConfigError(f"{found} (generation). Give one of each for every prompt, or one for all.")
    return every_options, every_seed


def left_pad(prompts: Sequence[TokenSequence]) -> Batch:
    """Prompts as one batch that ends in the last column for every row: nothing is a target, images stay in reading order."""
    longest = max(len(prompt) for prompt in prompts)

    def rows(tensors: list[Tensor], fill: int | bool) -> Tensor:
        return torch.stack([F.pad(tensor, (longest - len(tensor), 0), value=fill) for tensor in tensors])

    return Batch(
        input_ids=rows([prompt.input_ids for prompt in prompts], 0),
        labels=torch.full((len(prompts), longest), IGNORE_INDEX),
        attention_mask=rows([torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts], False),
        position_ids=rows([torch.arange(len(prompt)) for prompt in prompts], 0),
        is_visual=rows([prompt.is_visual for prompt in prompts], False),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
        visual_tokens=_all_visual_tokens(prompts),
        from_pixels=torch.cat([prompt.from_pixels for prompt in prompts]),
        visual_targets=torch.zeros(sum(prompt.num_images for prompt in prompts), dtype=torch.bool),
        ids=tuple(prompt.id for prompt in prompts),
        sources=tuple(prompt.source for prompt in prompts),
    )


def split_prompts(
    input_ids: Int64[Tensor, "b t"],
    attention_mask: Bool[Tensor, "b t"],
    is_visual: Bool[Tensor, "b t"],
    pixel_values: Float[Tensor, "m 3 h w"] | None,
    visual_tokens: Float[Tensor, "n k v"] | None,
    from_pixels: Bool[Tensor, " n"],
) -> list[TokenSequence]:
    """Rows of tensors as prompts, without their padding; images are flat over the rows, in reading order."""
    per_image = int(is_visual.sum()) // max(len(from_pixels), 1)
    counts = (is_visual.sum(dim=1) // max(per_image, 1)).tolist()
    pixels = torch.zeros(0, 3, 1, 1) if pixel_values is None else pixel_values
    flags = from_pixels.split(counts)
    own_pixels = pixels.split([int(flag.sum()) for flag in flags])
    own_tokens = [None] * len(flags) if visual_tokens is None else visual_tokens.split(counts)
    return [
        TokenSequence(
            input_ids=input_ids[row, real],
            labels=torch.full_like(input_ids[row, real], IGNORE_INDEX),
            is_visual=is_visual[row, real],
            pixel_values=own_pixels[row],
            visual_tokens=own_tokens[row],
            from_pixels=flags[row],
            visual_targets=torch.zeros_like(flags[row]),
            id=f"row {row}",
        )
        for row, real in enumerate(attention_mask)
    ]


def _all_visual_tokens(prompts: Sequence[TokenSequence]) -> Float[Tensor, "n k v"] | None:
    """Visual tokens of all images; rows of images that come as pixels, in prompts that have no tokens at all, are zero."""
    shape = next((prompt.visual_tokens.shape[1:] for prompt in prompts if prompt.visual_tokens is not None), None)
    if shape is None:
        return None
    return torch.cat([torch.zeros(p.num_images, *shape) if p.visual_tokens is None else p.visual_tokens.float() for p in prompts])


def _say_tokens(model: MetaMorph, state: GenerationState, rows: list[int]) -> list[int]:
    """The text token that each of these rows says: the one that is forced, else the choice of the text head."""
    slots = [state.slots[row] for row in rows]
    token_ids = [slot.forced_token(state.vocabulary) for slot in slots]
    free = [i for i, token_id in enumerate(token_ids) if token_id is None]
    if free:
        logits = model.predict_logits(state.hidden[[rows[i] for i in free]])
        for i, token_id in zip(free, choose_tokens(logits, [slots[i] for i in free], state.vocabulary), strict=True):
            token_ids[i] = token_id
    return [token_id for token_id in token_ids if token_id is not None]


def _advance(model: MetaMorph, state: GenerationState, inputs: Float[Tensor, "b d"], positions: list[int]) -> GenerationState:
    """Feed one embedding per row to the LLM: the next hidden states, and a cache one column longer."""
    mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(len(state), 1)], dim=1)
    cache = fork_cache(state.cache)
    hidden = _run_decoder(model, inputs[:, None], mask, torch.tensor(positions, device=inputs.device)[:, None], cache)
    return replace(state, hidden=hidden, attention_mask=mask, cache=cache)


def _run_decoder(
    model: MetaMorph,
    embeddings: Float[Tensor, "b new d"],
    attention_mask: Bool[Tensor, "b t"],
    position_ids: Int64[Tensor, "b new"],
    cache: DynamicCache,
) -> Float[Tensor, "b d"]:
    """The last state of each row after new positions, which are appended to the cache; the mask covers the cached ones too."""
    output = model.get_decoder()(
        inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state[:, -1]


def _check_room(prompt: TokenSequence, slot: Slot, vocabulary: Vocabulary) -> None:
    """Refuse a prompt that leaves no position for an answer, or none for the image it must begin with."""
    place, per_image = prompt.id or "conversation", vocabulary.num_visual_tokens + 2
    if len(prompt) >= vocabulary.context:
        images = f"{prompt.num_images} images x {per_image} positions + {len(prompt) - prompt.num_images * per_image} of text"
        raise ContextLengthError(
            f"{len(prompt)} positions ({images}) but fewer than {vocabulary.context} are needed ({place}). "
            f"Send less text, or at most {max(vocabulary.context - 1, 0) // per_image} images."
        )
    if slot.options.begin_with_image and not slot.may_begin_image(vocabulary):
        left = slot.positions_left(vocabulary)
        raise ContextLengthError(
            f"{left} positions left but an image needs {per_image} ({place}). Raise max_new_tokens or shorten the prompt."
        )
