"""The microworld's byte-pair tokenizer, trained on its text, with a chat template that marks what is generated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from metamorph.microworld.text import document
from metamorph.microworld.world import SceneRules, dense_caption, sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1280
MAX_LENGTH = 1024
PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Merges stay inside words, numbers, punctuation or white space; but a place of two words is one piece, so that it has one token, not two
# that it shares with other places.
_PIECES = r" ?(?:top|bottom) (?:left|right)\b| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
# Words that visual training uses and that the text corpus does not hold, so that they are single tokens too.
_EXTRA_TEXT = (
    "Generate an image of",
    "Here is an image based on your request:",
    "I will think about it visually.",
    "Here is the picture. Draw the next frame. Draw the missing frame. Look closely. Think visually.",
    "These frames are in the wrong order. Put them in order. Play it backwards. first second third frame frames",
)


def corpus(seed: int, documents: int) -> Iterator[str]:
    """Plain text of the documents that the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    for _ in range(documents):
        text = document(rng)
        yield from [text] if isinstance(text, str) else [said for _, said in text]  # turns by themselves: answers open without a space
        yield dense_caption(sample_scene(rng, SceneRules(use="any", glyph_rate=0.1, tiny_rate=0.1)))
        yield " ".join(_EXTRA_TEXT)


def build_tokenizer(seed: int = 0, documents: int = 6000) -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE, so that every string has tokens and decodes back to itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, END, *ROLE_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, documents), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={f"{role}_token": token for role, token in ROLE_TOKENS.items()},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
