"""The shipped model: batched answers equal single ones and the slow twin's, and it draws when asked."""

from __future__ import annotations

import pytest
import torch
from tests.reference import reference_generate

from metamorph.messages import Message
from metamorph.microworld.components import shipped
from metamorph.model.generation import generate
from metamorph.model.state import DecodingOptions
from metamorph.pipeline import MetaMorphPipeline

QUESTIONS = [
    "Generate an image of a small red star at the top left",
    "Generate an image of a large blue circle at the bottom right and a small green square at the top right",
    "What can you draw?",
    "Generate an image of a yellow triangle",
]


@pytest.fixture(scope="module")
def pipeline() -> MetaMorphPipeline:
    return MetaMorphPipeline.from_pretrained(shipped("metamorph"), shipped("decoder"), device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_single_and_twin(pipeline, temperature):
    drawn = pipeline(QUESTIONS[0], steps=1)
    conversations = [[Message.user(question)] for question in QUESTIONS]
    conversations.append([Message.user(QUESTIONS[0]), drawn.message, Message.user("What colour is the star?")])
    conversations.append([Message.user(drawn.images[0], "What shape is at the top left?")])
    prompts = [pipeline.encode(messages) for messages in conversations]
    options, seeds = DecodingOptions(max_new_tokens=72, temperature=temperature), list(range(len(prompts)))
    model, processor = pipeline.model, pipeline.processor
    for i, together in enumerate(generate(model, processor, prompts, options, seeds=seeds)):
        single = generate(model, processor, [prompts[i]], options, seeds=seeds[i])[0]
        twin = reference_generate(model, processor, prompts[i], options, seeds[i])
        assert together.token_ids == single.token_ids == tuple(twin.token_ids)
        for ours, alone, slow in zip(together.visual_tokens, single.visual_tokens, twin.images, strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours, slow, atol=1e-4, rtol=0)


def test_it_draws_when_asked_and_answers_about_its_drawing(pipeline):
    question = Message.user(QUESTIONS[0])
    reply = pipeline(question)
    assert len(reply.images) == 1
    assert reply.reason == "eos"
    later = pipeline([question, reply.message, Message.user("What colour is the star?")])
    assert later.text
    assert not later.images
