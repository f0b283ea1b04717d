"""From logits to the next text token of every row: bans, HF's logits processors, and randomness that belongs to the row alone.

Axes: r rows that choose a text token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from metamorph.model.state import DecodingOptions, Slot, Vocabulary


def choose_tokens(logits: Float[Tensor, "r vocab"], slots: Sequence[Slot], vocabulary: Vocabulary) -> list[int]:
    """The next text token of each row, greedy or sampled as its options say.

    A row's choice depends on its own logits, history, options and seed, never on the rows beside it.
    """
    scores = ban(logits.float(), slots, vocabulary)
    chosen = [0] * len(slots)
    for options in dict.fromkeys(slot.options for slot in slots):  # rows with equal options are processed together
        rows = [row for row, slot in enumerate(slots) if slot.options == options]
        history = [slots[row].text_ids for row in rows]
        processed = _process(scores[rows], history, options, vocabulary)
        if options.temperature == 0:
            picks = processed.argmax(dim=-1)
        else:
            uniforms = [float(torch.rand((), generator=row_generator(slots[row].seed, slots[row].num_new))) for row in rows]
            picks = _invert_cumulative(processed, uniforms)
        for row, pick in zip(rows, picks.tolist(), strict=True):
            chosen[row] = pick
    return chosen


def ban(scores: Float[Tensor, "r vocab"], slots: Sequence[Slot], vocabulary: Vocabulary) -> Float[Tensor, "r vocab"]:
    """Scores in which whatever a row may not say is minus infinity.

    The placeholder and ids without a token: always. <image_end>: unless an image has just been completed.
    <image_start>: unless another image is allowed and still fits.
    """
    scores = scores.clone()
    scores[:, vocabulary.size :] = -torch.inf
    scores[:, vocabulary.image_token_id : vocabulary.image_token_id + 1] = -torch.inf  # a slice: it may have no column
    for row, slot in enumerate(slots):
        if slot.mode != "image_end":
            scores[row, vocabulary.image_end_id] = -torch.inf
        if not slot.may_begin_image(vocabulary):
            scores[row, vocabulary.image_start_id] = -torch.inf
    return scores


def row_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one row at one position, on the CPU so that every device draws alike.

    It is made anew from (seed, index): the state of a generation then needs no hidden random state, and rows cannot disturb each other.
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _process(
    scores: Float[Tensor, "r vocab"], history: Sequence[tuple[int, ...]], options: DecodingOptions, vocabulary: Vocabulary
) -> Float[Tensor, "r vocab"]:
    """Apply HF's processors in HF's order: repetition penalty, temperature, top-k, top-p."""
    longest = max(len(ids) for ids in history)
    if options.repetition_penalty != 1.0 and longest:
        # Ragged histories are padded with a special token: all of them are exempt.
        filler = vocabulary.image_start_id
        ids = torch.tensor([(*row, *[filler] * (longest - len(row))) for row in history], device=scores.device)
        penalised = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))(ids, scores.clone())
        exempt = [*vocabulary.special_ids, filler]
        penalised[:, exempt] = scores[:, exempt]
        scores = penalised
    if options.temperature == 0:
        return scores
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(TopPLogitsWarper(float(options.top_p)))
    no_history = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)  # these three look at scores only
    for warper in warpers:
        scores = warper(no_history, scores)
    return scores


def _invert_cumulative(scores: Float[Tensor, "r vocab"], uniforms: Sequence[float]) -> Tensor:
    """The token in whose share of the cumulative distribution each row's uniform number falls."""
    # float64, because a share below float32's resolution at 1 must not vanish; `right=True` never lands on a share of width 0.
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
