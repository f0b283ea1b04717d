"""The microworld's language model: a small Llama pretrained on text only.

Axes: b sequences, t positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from metamorph.batch import IGNORE_INDEX
from metamorph.losses import LossTerm, text_cross_entropy
from metamorph.microworld.exercises import Chat
from metamorph.microworld.names import NamedLook
from metamorph.microworld.questions import SCORED, ask_about_name
from metamorph.microworld.text import Lesson, document, told
from metamorph.microworld.tokenizer import END, MAX_LENGTH, ROLE_TOKENS
from metamorph.microworld.world import SceneRules, sample_scene

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROW_LENGTH = 192  # positions of a row of text
LESSON_ENDS: dict[Lesson, float] = {"copying": 0.1, "finding": 0.28, "reading": 0.68, "all": 1.0}
LanguageSize = Literal["tiny", "small", "base"]
SIZES: dict[LanguageSize, dict[str, int]] = {
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3},
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4},
    "base": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
}


def build_llama(size: LanguageSize, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the given size with fresh weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES[size],
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=SIZES[size]["hidden_size"] ** -0.5,  # the usual 0.02 is made for wide models; here it delays reading
    )
    return LlamaForCausalLM(config)


@dataclass
class LanguageBatch:
    """Rows filled with whole documents; positions restart at each, by which attention knows their borders."""

    input_ids: Int64[Tensor, "b t"]
    position_ids: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]
    ids: tuple[str, ...] = ()
    target_counts: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> LanguageBatch:
        """The batch on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "labels")})


def language_batch(
    tokenizer: PreTrainedTokenizerFast, rows: int, length: int, rng: np.random.Generator, lesson: Lesson = "all"
) -> LanguageBatch:
    """Rows of `length` positions. `labels` hold the next id where it belongs to plain text or to what an assistant says.

    Users tell scenes at random: nothing could be learnt from predicting them.
    """
    ids = torch.full((rows, length), int(tokenizer.pad_token_id))
    positions = torch.zeros((rows, length), dtype=torch.long)
    labels = torch.full((rows, length), IGNORE_INDEX)
    for row in range(rows):
        filled = 0
        while True:
            fresh, spoken = _tokenized(tokenizer, document(rng, lesson))
            if filled + len(fresh) > length:
                break
            part = slice(filled, filled + len(fresh))
            ids[row, part], positions[row, part] = fresh, torch.arange(len(fresh))
            labels[row, filled : filled + len(fresh) - 1] = torch.where(spoken, fresh, IGNORE_INDEX)[1:]
            filled += len(fresh)
        positions[row, filled:] = torch.arange(length - filled)
    return LanguageBatch(ids, positions, labels, target_counts={"text": int((labels != IGNORE_INDEX).sum())})


def _tokenized(tokenizer: PreTrainedTokenizerFast, text: str | Chat) -> tuple[Int64[Tensor, " t"], Bool[Tensor, " t"]]:
    """A document's ids, as the chat template would write it, and which of them are targets."""
    turns = [("", text)] if isinstance(text, str) else text
    ids: list[int] = []
    spoken: list[bool] = []
    for (role, _), said in zip(turns, tokenizer([said + END for _, said in turns])["input_ids"], strict=True):
        opening = [tokenizer.convert_tokens_to_ids(ROLE_TOKENS[role])] if role else []
        ids += [*opening, *said]
        spoken += [*[False] * len(opening), *[role in ("", "assistant")] * len(said)]
    return torch.tensor(ids), torch.tensor(spoken)


def lesson_at(progress: float) -> Lesson:
    """What is taught at this share of the training."""
    return next(lesson for lesson, end in LESSON_ENDS.items() if progress < end)


def language_step(model: LlamaForCausalLM, batch: LanguageBatch) -> dict[str, LossTerm]:
    """Cross-entropy of the next token wherever there is a target."""
    # A cache, which is the default, would switch off the mask that keeps a row's documents apart.
    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    kept = batch.labels != IGNORE_INDEX
    return {"text": text_cross_entropy(model.lm_head(hidden[kept]), batch.labels[kept])}


@torch.no_grad()
def answers_in_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """Greedy answers to questions without a picture."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def name_questions(named: tuple[NamedLook, ...], seed: int, each: int) -> list[tuple[str, str]]:
    """Questions and answers about what names mean, `each` of them for every name."""
    rng = np.random.default_rng(seed)
    asked = [ask_about_name(one, rng) for one in named for _ in range(each)]
    return [(question.text, question.answer) for question in asked]


def told_scene_questions(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and answers about scenes that are told in words, of each scored type as many as of any other."""
    rng, asked = np.random.default_rng(seed), []
    while len(asked) < count:
        scene = sample_scene(rng, SceneRules(use="any", split=None))
        question = list(SCORED.values())[len(asked) % len(SCORED)](scene, rng)
        if question is not None:
            asked.append((told(scene, rng) + question.text, question.answer))
    return asked


@torch.no_grad()
def text_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int = 64) -> float:
    """Perplexity per target (plain text, and what assistants say) on fresh documents."""
    batch = language_batch(tokenizer, rows, ROW_LENGTH, np.random.default_rng(seed)).to(model.device)
    term = language_step(model, batch)["text"]
    return float((term.sum / term.count).exp())
