"""The pipeline and `metamorph generate`: whatever people send, and what they get back."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.tiny import make_eager_to_draw, save_decoder, save_parts
from typer.testing import CliRunner

from metamorph.cli.generate import drawing_prompt, image_paths, load
from metamorph.cli.main import app
from metamorph.errors import CheckpointError, ConfigError, ContextLengthError, MetaMorphError, RecordError
from metamorph.messages import ImagePart, Message
from metamorph.model.conversion import initialize
from metamorph.model.events import End, ImageEnd, TextDelta
from metamorph.pipeline import MetaMorphPipeline, Picture
from metamorph.provenance import read

K = 4
DRAW = {"begin_with_image": True, "max_new_tokens": 20, "steps": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model with its decoder beside it, as `--model` finds them."""
    root = tmp_path_factory.mktemp("checkpoint")
    model, processor = initialize(*save_parts(root / "parts"), num_visual_tokens=K)
    make_eager_to_draw(model)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    save_decoder(root / "model" / "decoder", num_visual_tokens=K, vision_width=24)
    return root / "model"


@pytest.fixture(scope="module")
def pipeline(directory) -> MetaMorphPipeline:
    return MetaMorphPipeline.from_pretrained(directory, decoder=directory / "decoder", device="cpu")


def picture(colour="red") -> Image.Image:
    return Image.new("RGB", (48, 40), colour)


def test_every_form_of_an_image_says_the_same(pipeline, tmp_path):
    picture().save(tmp_path / "red.png")
    png = (tmp_path / "red.png").read_bytes()
    replies = [pipeline(Message.user(image, "What?"), max_new_tokens=12) for image in (picture(), tmp_path / "red.png", png)]
    other = pipeline(Message.user(picture("blue"), "What?"), max_new_tokens=12)
    frames = pipeline(Message.user([picture("red"), picture("blue")], "What happens?"), max_new_tokens=12)
    assert replies[0].token_ids == replies[1].token_ids == replies[2].token_ids
    assert other.token_ids != replies[0].token_ids
    assert frames.message.role == "assistant"


def test_one_conversation_gives_a_reply_and_several_a_list(pipeline):
    options = {"temperature": 1.0, "max_new_tokens": 24, "steps": 2}
    single = pipeline("Hello", seed=5, **options)
    again = pipeline([Message.user("Hello")], seed=5, **options)
    several = pipeline(["Hello", "Something longer"], seed=[5, 6], **options)
    assert single.token_ids == again.token_ids == several[0].token_ids
    assert len(several) == 2
    for one, two in zip(single.images, several[0].images, strict=True):  # pixels too depend on the seed, not on the batch
        assert max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)) <= 2


def test_what_is_drawn_comes_as_tokens_and_as_pixels(pipeline):
    reply = pipeline("Draw", **DRAW)
    assert len(reply.images) == len(reply.visual_tokens) == len(reply.message.images) >= 1
    assert all(tokens.shape == (K, 24) for tokens in reply.visual_tokens)
    assert all(image.mode == "RGB" for image in reply.images)
    assert all(image.image is None for image in reply.message.images)


def test_the_stream_tells_what_the_call_returns(pipeline):
    events = list(pipeline.stream("Draw", **DRAW))
    reply = pipeline("Draw", **DRAW)
    assert [type(event) for event in events] == [type(event) for event in reply.events]
    assert isinstance(events[-1], End)
    assert events[-1].reason == reply.reason
    for event, following in pairwise(events):
        assert isinstance(following, Picture) == isinstance(event, ImageEnd)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == reply.text


def test_a_later_question_reads_the_drawn_tokens_not_the_pixels(pipeline):
    reply = pipeline("Draw", **DRAW)
    question = [Message.user("Draw"), reply.message, Message.user("What is it?")]
    encoded = []
    hook = pipeline.model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    try:
        later = pipeline(question, max_new_tokens=16)
    finally:
        hook.remove()
    assert not encoded  # no pixels were encoded
    prompt = pipeline.encode(question)
    assert not prompt.from_pixels.any()
    torch.testing.assert_close(prompt.visual_tokens[0], reply.visual_tokens[0])
    other = ImagePart(visual_tokens=torch.nn.functional.normalize(torch.randn(K, 24, generator=torch.Generator().manual_seed(3)), dim=-1))
    swapped = [question[0], Message("assistant", (other, *reply.message.parts[1:])), question[2]]
    assert pipeline(swapped, max_new_tokens=16).token_ids != later.token_ids


def test_without_a_decoder_tokens_are_drawn_but_no_pixels(pipeline):
    bare = MetaMorphPipeline(pipeline.model, pipeline.processor)
    reply = bare("Draw", **DRAW)
    assert reply.visual_tokens
    assert reply.images == []
    assert not any(isinstance(event, Picture) for event in bare.stream("Draw", **DRAW))
    with pytest.raises(ConfigError, match="0 decoders"):
        bare.decode_images(torch.zeros(1, K, 24), seeds=[0])


def test_every_image_knows_how_it_was_drawn(pipeline, directory, tmp_path):
    reply = pipeline("Draw", seed=5, guidance_scale=2.0, temperature=0.5, **DRAW)
    for number, image in enumerate(reply.images):
        image.save(tmp_path / "star.png")
        origin = read(tmp_path / "star.png")
        assert (origin.seed, origin.image, origin.steps, origin.guidance_scale) == (5, number, 2, 2.0)
        assert origin.decoding["temperature"] == 0.5 and origin.decoding["begin_with_image"]
        assert origin.model.name.endswith("/model") and origin.decoder.name == "model/decoder"
        assert origin.model.sha256 != origin.decoder.sha256
        assert (origin.prompt, origin.prompt_sha256) == (None, hashlib.sha256(b"user: Draw").hexdigest())
        assert b"Draw" not in (tmp_path / "star.png").read_bytes() and str(directory).encode() not in (tmp_path / "star.png").read_bytes()
    kept = [event.image for event in pipeline.stream("Draw", seed=5, keep_prompt=True, **DRAW) if isinstance(event, Picture)]
    assert [image.provenance.prompt for image in kept] == ["user: Draw"] * len(reply.images)
    assert kept[0].provenance.model == reply.images[0].provenance.model
    # What the file says suffices to draw the picture again.
    said = reply.images[-1].provenance
    again = pipeline("Draw", seed=said.seed, steps=said.steps, guidance_scale=said.guidance_scale, **said.decoding)
    assert again.images[said.image].tobytes() == reply.images[-1].tobytes()
    assert pipeline.decode_images(torch.zeros(1, K, 24), seeds=[3], steps=1)[0].provenance.model is None


def test_versions_are_read_once_and_not_for_every_answer(pipeline, monkeypatch):
    from metamorph import pipeline as module

    asked, real = [], module.version
    monkeypatch.setattr(module, "version", lambda name: asked.append(name) or real(name))
    for _ in range(3):
        pipeline("Hello", max_new_tokens=2)
    assert len(asked) <= 1


def test_models_that_were_not_loaded_as_they_are_claim_no_directory(pipeline):
    built = MetaMorphPipeline(pipeline.model, pipeline.processor, pipeline.decoder)
    assert (built.model_part.name, built.model_part.of) == ("MetaMorph", "config")
    assert built.decoder_part.name == "VisualDecoderPipeline"
    assert built.model_part.sha256 == pipeline.model_part.sha256


def test_saving_and_loading_keeps_the_answer(pipeline, directory):
    again = MetaMorphPipeline.from_pretrained(directory, device="cpu")
    assert again("Hello", max_new_tokens=24, steps=1).token_ids == pipeline("Hello", max_new_tokens=24, steps=1).token_ids


def test_decoding_images_one_by_one_and_together(pipeline):
    tokens = torch.nn.functional.normalize(torch.randn(3, K, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    together = pipeline.decode_images(tokens, seeds=[1, 2, 3], steps=2)
    alone = pipeline.decode_images(tokens[1:2], seeds=[2], steps=2)[0]
    assert max(abs(a - b) for a, b in zip(together[1].tobytes(), alone.tobytes(), strict=True)) <= 2


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "0 messages"),
        ([Message.system("Be brief.")], "0 others"),
        ([Message.user("a"), Message.assistant("b")], "last message by the assistant"),
        ([Message.user("a"), Message.user("b")], "'user' but 'assistant'"),
        ([Message("system", (ImagePart(picture()),)), Message.user("a")], "system turn"),
        ([Message.user()], "empty user turn"),
        ("", "empty user turn"),
    ],
)
def test_conversations_without_an_answerable_end_are_refused(pipeline, conversation, message):
    with pytest.raises(RecordError, match=message):
        pipeline(conversation)


def test_more_images_than_the_context_holds_are_refused_before_any_is_opened(pipeline):
    missing = [Path("does-not-exist.png")] * 60
    with pytest.raises(ContextLengthError, match=r"60 images x 6 positions but fewer than 256 .*at most 42 images"):
        pipeline(Message.user(missing, "What happens?"))


def test_the_refused_one_of_several_is_named(pipeline):
    with pytest.raises(MetaMorphError, match="conversation 2 of 2"):
        pipeline([[Message.user("a")], [Message.user("a"), Message.assistant("b")]])
    with pytest.raises(ConfigError, match="Did you mean temperature"):
        pipeline("a", temperatur=1.0)


def test_a_bare_description_becomes_a_drawing_prompt():
    assert drawing_prompt("a red star") == "Generate an image of a red star"
    assert drawing_prompt("Generate an image of a red star") == "Generate an image of a red star"
    assert drawing_prompt("Draw a red star.") == "Draw a red star."
    assert image_paths(Path("out/star.png"), 3) == [Path("out/star.png"), Path("out/star-2.png"), Path("out/star-3.png")]


def test_command_prints_the_answer_and_saves_the_images(directory, tmp_path):
    picture().save(tmp_path / "red.png")
    runner = CliRunner()
    arguments = ["generate", "--model", str(directory), "--device", "cpu", "--steps", "1", "--max-new-tokens", "40"]
    asked = runner.invoke(app, [*arguments, "What is this?", "--image", str(tmp_path / "red.png")])
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.strip()
    target = tmp_path / "new" / "star.png"
    drawn = runner.invoke(app, [*arguments, "a star", "-o", str(target), "--temperature", "1.0", "--seed", "3"])
    assert drawn.exit_code == 0, drawn.output
    assert f"saved {target}" in drawn.stderr
    with Image.open(target) as saved:
        assert saved.mode == "RGB"
    assert read(target).seed == 3 and read(target).prompt is None
    for option, expected in (("--keep-prompt", "user: Generate an image of a star"), ("--no-metadata", None)):
        assert runner.invoke(app, [*arguments, "a star", "-o", str(target), "--temperature", "1.0", "--seed", "3", option]).exit_code == 0
        assert (read(target).prompt if expected else read(target)) == expected


def test_command_says_that_nothing_was_drawn(directory, tmp_path):
    target = tmp_path / "star.png"
    arguments = ["generate", "--model", str(directory), "--device", "cpu", "a", "-o", str(target), "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "drew no image" in result.stderr
    assert not target.exists()


@pytest.mark.parametrize(("name", "message"), [("star", "suffix ''"), ("star.xyz", "suffix '.xyz'"), ("", "a directory")])
def test_command_refuses_an_output_that_cannot_be_written_first(directory, tmp_path, name, message):
    result = CliRunner().invoke(app, ["generate", "--model", "missing", "a star", "-o", str(tmp_path / name)])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize("found", [True, False])
def test_command_looks_for_the_decoder_once(directory, tmp_path, monkeypatch, found):
    from metamorph import pipeline as module

    asked, real = [], module.find_decoder
    monkeypatch.setattr(module, "find_decoder", lambda model: asked.append(model) or (real(model) if found else None))
    pipeline = load(str(directory), None, "cpu", needs_decoder=found)
    assert (len(asked), pipeline.decoder is not None) == (1, found)


def test_command_refuses_a_model_without_decoder_when_an_image_is_wanted(directory, tmp_path):
    bare = tmp_path / "model"
    bare.mkdir()
    result = CliRunner().invoke(app, ["generate", "--model", str(bare), "a star", "-o", str(tmp_path / "star.png")])
    assert isinstance(result.exception, CheckpointError)
    assert "no decoder" in str(result.exception)
