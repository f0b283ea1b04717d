"""Slow, obvious twins of the fast paths: no cache, one sample at a time, everything recomputed for every element.

Axes: t positions, d LLM width, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metamorph.batch import TokenSequence
from metamorph.model.generation import vocabulary_of
from metamorph.model.sampling import row_generator
from metamorph.model.state import DecodingOptions, Vocabulary


@dataclass
class ReferenceAnswer:
    """What the twin says; compare it with `Answer`."""

    token_ids: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # each "k v"
    reason: str = ""


@torch.no_grad()
def reference_generate(model, processor, prompt: TokenSequence, options: DecodingOptions, seed: int = 0) -> ReferenceAnswer:
    """Answer one prompt, reading the whole sequence anew before each element."""
    vocabulary = vocabulary_of(model, processor)
    k = vocabulary.num_visual_tokens
    answer, said, current = ReferenceAnswer(), [], None  # said: ids and visual tokens; current: tokens of an unfinished image
    after_image = False
    while not answer.reason:
        hidden = last_state(model, prompt, said)
        if current is not None:
            token = model.predict_visual_tokens(hidden)
            said.append(token)
            current.append(token)
            if len(current) == k:
                answer.images.append(torch.stack(current))
                current, after_image = None, True
        else:
            token_id = next_id(model, hidden, prompt, answer, len(said), after_image, options, vocabulary, seed)
            said.append(token_id)
            answer.token_ids.append(token_id)
            after_image = False
            if token_id == vocabulary.image_start_id:
                current = []
            if token_id in vocabulary.stop_ids:
                answer.reason = "eos"
        if not answer.reason and len(said) >= options.max_new_tokens:
            answer.reason = "length"
        if not answer.reason and len(prompt) + len(said) >= vocabulary.context:
            answer.reason = "context"
    return answer


def last_state(model, prompt: TokenSequence, said: list) -> Tensor:
    """The state "d" after the prompt and all that was said, every image encoded and every position embedded anew."""
    visual, pixels = [], 0
    for image, from_pixels in enumerate(prompt.from_pixels.tolist()):
        if from_pixels:
            visual += model.encode_images(prompt.pixel_values[pixels : pixels + 1])[0].unbind()
            pixels += 1
        else:
            visual += prompt.visual_tokens[image].unbind()
    visual += [item for item in said if not isinstance(item, int)]
    is_visual = torch.tensor(prompt.is_visual.tolist() + [not isinstance(item, int) for item in said])
    ids = torch.tensor(prompt.input_ids.tolist() + [item if isinstance(item, int) else 0 for item in said])
    sequence = model.get_input_embeddings()(ids)
    if visual:
        sequence[is_visual] = model.project(torch.stack(visual))
    mask = torch.ones(1, len(sequence), dtype=torch.bool)
    return model.get_decoder()(inputs_embeds=sequence[None], attention_mask=mask, use_cache=False).last_hidden_state[0, -1]


def next_id(
    model, hidden, prompt, answer: ReferenceAnswer, num_said: int, after_image: bool, options: DecodingOptions, vocabulary: Vocabulary, seed
) -> int:
    """The next text token by the rules, written out."""
    if after_image and options.force_image_end:
        return vocabulary.image_end_id
    if options.begin_with_image and num_said == 0:
        return vocabulary.image_start_id
    scores = dict(enumerate(model.predict_logits(hidden).tolist()))
    scores = {token_id: score for token_id, score in scores.items() if token_id < vocabulary.size and token_id != vocabulary.image_token_id}
    if not after_image:
        del scores[vocabulary.image_end_id]
    needed = vocabulary.num_visual_tokens + 2
    fits = num_said + needed <= options.max_new_tokens and len(prompt) + num_said + needed <= vocabulary.context
    begun = answer.token_ids.count(vocabulary.image_start_id)
    if not (options.allow_images and fits and begun < options.max_images):
        del scores[vocabulary.image_start_id]
    for token_id in set(answer.token_ids) - set(vocabulary.special_ids):
        penalty = options.repetition_penalty
        scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
    if options.temperature == 0:
        return max(scores, key=lambda token_id: scores[token_id])
    return sample(scores, options, seed, num_said)


def sample(scores: dict[int, float], options: DecodingOptions, seed: int, num_said: int) -> int:
    """Temperature, top-k, top-p, then the token in whose share of the unit interval the row's random number falls."""
    best = sorted(scores, key=lambda token_id: scores[token_id], reverse=True)[: options.top_k]
    weights = (torch.tensor([scores[token_id] for token_id in best], dtype=torch.float64) / options.temperature).softmax(0).tolist()
    kept, total = {}, 0.0
    for token_id, weight in zip(best, weights, strict=True):
        if options.top_p is None or total < options.top_p:
            kept[token_id] = weight
            total += weight
    point = float(torch.rand((), generator=row_generator(seed, num_said))) * total
    for token_id in sorted(kept):
        point -= kept[token_id]
        if point < 0:
            return token_id
    return max(kept)
