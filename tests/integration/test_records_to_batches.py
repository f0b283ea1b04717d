"""From records on disk, by the real processor, to batches: the path that every training run takes."""

from functools import partial

import pytest
import torch
from PIL import Image
from tests.tiny import tiny_tokenizer

from metamorph.data.collate import pack, unpack
from metamorph.data.example_encoder import ExampleEncoder
from metamorph.data.inspection import target_texts
from metamorph.data.mixture import Mixture, WeightedSource
from metamorph.data.record_files import write_jsonl
from metamorph.data.source import open_source
from metamorph.data.stream import BatchStream
from metamorph.errors import ContextLengthError, MediaError
from metamorph.messages import Example, Message


@pytest.fixture(scope="module")
def processor():
    from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN
    from metamorph.model.processing import MetaMorphProcessor

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN], special_tokens=True)
    return MetaMorphProcessor(tokenizer, num_visual_tokens=4, image_size=(32, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    for number in range(4):
        Image.new("RGB", (20 + number, 30), (60 * number, 0, 0)).save(root / f"{number}.png")
    (root / "broken.png").write_bytes((root / "0.png").read_bytes()[:50])
    questions = [
        Example((Message.user(root / f"{i % 4}.png", "What is <image_start>?"), Message.assistant(f"Picture {i}.")), f"q{i}", "qa")
        for i in range(9)
    ]
    drawings = [Example((Message.user(f"Draw {i}"), Message.assistant("Here:", root / f"{i % 4}.png")), f"d{i}", "draw") for i in range(5)]
    write_jsonl(root / "questions.jsonl", questions)
    write_jsonl(root / "drawings.jsonl", drawings)
    write_jsonl(root / "bad.jsonl", [questions[0], Example((Message.user(root / "broken.png"), Message.assistant("?")), "b", "bad")])
    return root


def make_stream(folder, processor, *names, max_length=200, **options):
    sources = [WeightedSource(open_source(folder / f"{name}.jsonl")) for name in names]
    encode = ExampleEncoder(processor, max_length)
    return BatchStream(
        Mixture(sources, seed=1, order="epoch"), encode, batch_size=4, collate=partial(pack, max_length=max_length), **options
    )


def test_an_epoch_of_records_arrives_whole_with_the_right_targets(folder, processor):
    sequences = [s for step in make_stream(folder, processor, "questions", "drawings") for batch in step for s in unpack(batch)]
    assert sorted(s.id for s in sequences) == sorted([f"q{i}" for i in range(9)] + [f"d{i}" for i in range(5)])
    for s in sequences:
        targets = target_texts(s, lambda ids: processor.decode(ids))
        if s.id.startswith("q"):
            assert targets == [f"Picture {s.id[1:]}.<|end|>"]
            assert not s.visual_targets.any()
        else:
            assert targets == ["Here:<image_start>", "[image 0: 4 visual tokens]", "<image_end><|end|>"]
            red = s.pixel_values[0, 0].mean() * 0.5 + 0.5
            assert abs(red * 255 - 60 * (int(s.id[1:]) % 4)) < 1


def test_reading_ahead_while_the_processor_is_used_elsewhere(folder, processor):
    ahead = make_stream(folder, processor, "questions", "drawings")
    plain = make_stream(folder, processor, "questions", "drawings", prefetch=0)
    for step, expected in zip(ahead, plain, strict=True):
        for batch, twin in zip(step, expected, strict=True):
            for _ in range(5):  # as an evaluator does between steps, while the thread encodes
                processor.encode((Message.user("How many?"), Message.assistant("Three.")), max_length=64)
            assert torch.equal(batch.input_ids, twin.input_ids)
            assert torch.equal(batch.pixel_values, twin.pixel_values)


def test_a_broken_image_is_named_with_its_record(folder, processor):
    with pytest.raises(MediaError, match=r"broken\.png.*bad\.jsonl:2"):
        list(make_stream(folder, processor, "bad"))


def test_a_record_that_does_not_fit_is_named(folder, processor):
    with pytest.raises(ContextLengthError, match=r"at most 20 .*\.jsonl:\d+"):
        list(make_stream(folder, processor, "drawings", max_length=20))
