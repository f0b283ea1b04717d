"""The language model's rows: what is a target, and that the documents of a row stay apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metamorph.batch import IGNORE_INDEX
from metamorph.microworld.language import build_llama, language_batch, language_step
from metamorph.microworld.text import document
from metamorph.microworld.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(documents=300)


@pytest.mark.parametrize("lesson", ["copying", "finding", "reading", "all"])
def test_targets_are_plain_text_and_what_the_template_marks_as_the_assistants(tokenizer, lesson):
    """Against the slow twin: the chat template's own mask, document by document."""
    ids: list[int] = []
    labels: list[int] = []
    rng = np.random.default_rng(0)
    while True:
        text = document(rng, lesson)
        if isinstance(text, str):
            fresh = tokenizer(text + tokenizer.eos_token)["input_ids"]
            mask = [1] * len(fresh)
        else:
            chat = [{"role": role, "content": said} for role, said in text]
            made = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            fresh, mask = made["input_ids"], made["assistant_masks"]
        if len(ids) + len(fresh) > 512:
            break
        ids += fresh
        labels += [one if spoken else IGNORE_INDEX for one, spoken in zip(fresh[1:], mask[1:], strict=True)] + [IGNORE_INDEX]
    batch = language_batch(tokenizer, rows=1, length=512, rng=np.random.default_rng(0), lesson=lesson)
    assert batch.input_ids[0, : len(ids)].tolist() == ids and batch.labels[0, : len(ids)].tolist() == labels
    assert batch.target_counts["text"] == sum(label != IGNORE_INDEX for label in labels) > 30


def test_documents_of_a_row_do_not_see_each_other(tokenizer):
    torch.manual_seed(0)
    model = build_llama("tiny", tokenizer)
    batch = language_batch(tokenizer, rows=1, length=512, rng=np.random.default_rng(1), lesson="reading")
    second, third = (batch.position_ids[0] == 0).nonzero().flatten().tolist()[1:3]
    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    labels[:, second:third] = batch.labels[:, second:third]
    assert (labels != IGNORE_INDEX).any()
    spoiled = batch.input_ids.clone()
    spoiled[:, :second] = tokenizer.eos_token_id
    before, after = (language_step(model, replace(batch, input_ids=ids, labels=labels))["text"].sum for ids in (batch.input_ids, spoiled))
    assert torch.allclose(before, after, rtol=1e-5)
