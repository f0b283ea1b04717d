"""Losses by source: their weighted means are the losses of the step, whatever the layout of its batches."""

import logging
from functools import partial

import pytest
import torch
from tests.sequences import sequence

from metamorph.batch import IGNORE_INDEX, predictable
from metamorph.data.collate import pack, pad
from metamorph.losses import LossTerm
from metamorph.training.source_losses import MAX_SOURCES, SourceLosses
from metamorph.training.stepping import SharedCounts, StepPart

KINDS = ("text", "visual")


def documents(count=7):
    """From two sources, with different weights and images."""
    return [
        sequence(i, before=1 + i % 3, images=("drawn", "pixels", "drawn")[: i % 4], after=2 + i % 2, weight=1.0 + i) for i in range(count)
    ]


def values_of(batch):
    """A value for each target that tells whose it is: the id at its position, or that of its image's place."""
    text = predictable(batch.attention_mask, batch.document_lengths) & (batch.labels != IGNORE_INDEX)
    k = batch.tokens_per_image
    drawn = batch.pixel_values[batch.visual_targets][:, 0, 0, 0].repeat_interleave(k) if k else torch.zeros(0)
    return {"text": batch.input_ids[text].float(), "visual": drawn}


def part_of(batch, values):
    sums = torch.stack([values[kind].sum() for kind in KINDS])
    return StepPart(list(KINDS), sums, torch.tensor([0.0, 0.0]), [1.0, 1.0], values)


def step_of(batches, follower=None, passes=None):
    shared = SharedCounts({}, len(batches), passes or len(batches))
    parts = [part_of(batch, values_of(batch)) for batch, _ in shared.padded(batches)]
    return parts, (follower or SourceLosses()).of_step(parts, batches, shared)


@pytest.mark.parametrize("collate", [pad, partial(pad, side="left"), partial(pack, max_length=60)])
@pytest.mark.parametrize("size", [7, 3])
def test_every_target_counts_for_its_own_source(collate, size):
    made = documents()
    batches = [collate(made[start : start + size]) for start in range(0, 7, size)]
    parts, found = step_of(batches)
    for kind in KINDS:
        whole = sum(float(part.per_target[kind].sum()) for part in parts)
        names = [key.removeprefix(f"loss/{kind}/") for key in found if key.startswith(f"loss/{kind}/")]
        assert names == ["source0", "source1"]
        assert sum(found[f"loss/{kind}/{name}"] * found[f"targets/{kind}/{name}"] for name in names) == pytest.approx(whole, rel=1e-6)
    for number, name in enumerate(("source0", "source1")):  # the values say whose they are
        own = [document for document in made if int(document.id[1:]) % 2 == number]
        expected = [float(value) for document in own for value in document.labels[document.labels != IGNORE_INDEX]]
        assert found[f"targets/text/{name}"] == len(expected)
        assert found[f"loss/text/{name}"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
        assert found[f"targets/visual/{name}"] == sum(document.num_visual_targets for document in own)


def test_a_repeated_pass_does_not_count():
    batches = [pad(documents())]
    assert step_of(batches, passes=3)[1] == step_of(batches)[1]


def test_one_source_has_no_curves_and_a_second_brings_them():
    follower, made = SourceLosses(), documents()
    assert step_of([pad(made[::2])], follower)[1] == {}
    assert set(step_of([pad(made)], follower)[1]) >= {"loss/text/source0", "loss/text/source1"}
    assert set(step_of([pad(made[2:3])], follower)[1]) >= {"loss/text/source0"}


def test_too_many_sources_are_told_once(caplog):
    from dataclasses import replace

    follower = SourceLosses()
    made = [replace(sequence(i), source=f"s{i}") for i in range(MAX_SOURCES + 1)]
    with caplog.at_level(logging.WARNING):
        assert step_of([pad(made)], follower)[1] == step_of([pad(made)], follower)[1] == {}
    assert len(caplog.records) == 1


def test_terms_without_values_and_batches_without_sources_pass():
    batch = pad(documents())
    part = part_of(batch, values_of(batch))
    part.per_target["visual"] = None
    found = SourceLosses().of_step([part], [batch], SharedCounts({}, 1, 1))
    assert {key.split("/")[1] for key in found} == {"text"}

    class Other:
        target_counts = {"text": 1}  # noqa: RUF012

        def to(self, device):
            return self

    assert SourceLosses().of_step([part], [Other()], SharedCounts({}, 1, 1)) == {}


def test_what_is_kept_of_a_loss_has_no_gradient():
    from metamorph.losses import cosine_loss, text_cross_entropy

    logits = torch.randn(5, 7, requires_grad=True)
    for term in (text_cross_entropy(logits, torch.arange(5), torch.rand(5)), cosine_loss(logits, torch.randn(5, 7))):
        assert isinstance(term, LossTerm) and not term.per_target.requires_grad
        assert float(term.per_target.sum()) == pytest.approx(float(term.sum.detach()), rel=1e-6)
