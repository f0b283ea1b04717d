"""The six kinds: who says what, promises that are kept, wording that is checked, and choices that only the generator makes."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metamorph.data.frames import MAX_PREDICTED, MAX_SHUFFLED, MIN_FRAMES, VARIANTS, Variant, plan_frames, possible_variants, spell_seconds
from metamorph.data.kinds import (
    Generation,
    ImageQA,
    ImageToImage,
    PureVideo,
    Turn,
    VideoQA,
    VisualThinking,
    generation,
    image_qa,
    image_to_image,
    pure_video,
    video_qa,
    visual_thinking,
)
from metamorph.data.phrasings import DEFAULT, load_phrasings
from metamorph.data.regions import COLOURS, Box, NamedBox, crop_region, draw_boxes
from metamorph.errors import ConfigError, MediaError, RecordError
from metamorph.messages import Example, ImagePart, TextPart, VideoPart, validate_messages

NAMES = {"id": "7", "source": "some data", "origin": "rows.jsonl:8"}
SEEDS = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def clip(length: int) -> tuple[Path, ...]:
    return tuple(Path(f"{number}.png") for number in range(length))


def numbers(parts: Sequence[ImagePart]) -> list[int]:
    return [int(part.image.stem) for part in parts if isinstance(part.image, Path)]


def said(example: Example) -> list[str]:
    return [message.text for message in example.messages]


def roles_and_parts(example: Example) -> list[tuple[str, list[str]]]:
    return [(message.role, [type(part).__name__ for part in message.parts]) for message in example.messages]


# --- image questions, generation, editing, video questions


def test_image_qa_shows_its_images_once_and_keeps_the_turns():
    row = ImageQA(images=(Path("a.png"), Path("b.png")), turns=(Turn(" How many? ", "Two."), Turn("Sure?", "Yes.")), **NAMES)
    example = image_qa(row, rng())
    assert roles_and_parts(example) == [
        ("user", ["ImagePart", "ImagePart", "TextPart"]),
        ("assistant", ["TextPart"]),
        ("user", ["TextPart"]),
        ("assistant", ["TextPart"]),
    ]
    assert said(example) == ["How many?", "Two.", "Sure?", "Yes."]
    assert (example.id, example.source, example.kind, example.origin) == ("7", "some data", "image_qa", "rows.jsonl:8")


def test_a_description_gets_a_request_and_plain_text_is_a_kind_of_its_own():
    described = image_qa(ImageQA(images=(Path("a.png"),), turns=(Turn(None, "A cat."),), **NAMES), rng())
    assert said(described)[0] in DEFAULT.image_qa.describe.sentences
    assert image_qa(ImageQA(images=(), turns=(Turn("Hello?", "Hello."),), **NAMES), rng()).kind == "text"
    with pytest.raises(RecordError, match=r"no question and no image .*rows.jsonl:8"):
        image_qa(ImageQA(images=(), turns=(Turn(None, "A cat."),), **NAMES), rng())


@given(seed=SEEDS)
def test_generation_uses_the_papers_words(seed: int):
    example = generation(Generation(image=Path("a.png"), caption=" a {red} dog\n", **NAMES), rng(seed))
    assert roles_and_parts(example) == [("user", ["TextPart"]), ("assistant", ["TextPart", "ImagePart"])]
    assert "a {red} dog" in said(example)[0]
    assert said(example)[1] == "Here is an image based on your request:"
    validate_messages(example.messages, needs_answer=True)


def test_the_papers_sentences_are_there_word_for_word():
    assert "Generate an image of {caption}" in DEFAULT.generation.request.sentences
    assert "I will think about it visually" in DEFAULT.thinking.reply.sentences


def test_image_to_image_says_the_instruction_and_answers_with_the_image_alone():
    row = ImageToImage(source_image=Path("a.png"), target_image=Path("b.png"), instruction="Make this a rainy day.", **NAMES)
    example = image_to_image(row, rng())
    assert said(example) == ["Make this a rainy day.", ""]
    assert [numbers_or_name(message.images) for message in example.messages] == [["a"], ["b"]]
    assert (roles_and_parts(example)[1], example.kind) == (("assistant", ["ImagePart"]), "edit")


def numbers_or_name(images: Sequence[ImagePart]) -> list[str]:
    return [part.image.stem for part in images if isinstance(part.image, Path)]


def test_video_qa_shows_all_frames_as_one_video():
    example = video_qa(VideoQA(frames=clip(5), turns=(Turn("What happens?", "It falls."), Turn(None, "A cup.")), fps=2.0, **NAMES), rng())
    video = example.messages[0].parts[0]
    assert isinstance(video, VideoPart)
    assert (numbers(video.frames), video.fps, example.kind) == ([0, 1, 2, 3, 4], 2.0, "video_qa")
    assert said(example)[2] in DEFAULT.video_qa.describe.sentences
    with pytest.raises(RecordError, match="0 frames"):
        video_qa(VideoQA(frames=(), turns=(Turn("What?", "It."),), **NAMES), rng())


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (image_qa, ImageQA(images=(Path("a.png"),), turns=(), **NAMES)),
        (image_qa, ImageQA(images=(Path("a.png"),), turns=(Turn("Why?", " "),), **NAMES)),
        (image_qa, ImageQA(images=(Path("a.png"),), turns=(Turn("", "Because."),), **NAMES)),
        (generation, Generation(image=Path("a.png"), caption="\n", **NAMES)),
        (image_to_image, ImageToImage(source_image=Path("a.png"), target_image=Path("b.png"), instruction="", **NAMES)),
        (visual_thinking, VisualThinking(image=Path("a.png"), question="Why?", answer="", key=Path("b.png"), **NAMES)),
    ],
)
def test_what_is_blank_is_refused_with_its_place(make, row):
    with pytest.raises(RecordError, match=r"rows.jsonl:8"):
        make(row, rng())


# --- frame prediction


@pytest.mark.parametrize("variant", VARIANTS)
@given(length=st.integers(1, 60), seed=SEEDS, interval=st.floats(0.1, 10))
def test_every_variant_promises_what_it_shows_and_asks(variant: Variant, length: int, seed: int, interval: float):
    row = PureVideo(frames=clip(length), interval=interval, **NAMES)
    if length < MIN_FRAMES[variant]:
        with pytest.raises(RecordError, match=rf"{length} frame\(s\) .* none of the variants {variant} .*rows.jsonl:8"):
            pure_video(row, rng(seed), variants=[variant])
        return
    example = pure_video(row, rng(seed), variants=[variant])
    assert example == pure_video(row, rng(seed), variants=[variant])
    assert example.kind == "frames"
    validate_messages(example.messages, needs_answer=True)
    question, answer = example.messages
    shown, asked = numbers(question.images), numbers(answer.images)
    promised = [int(number) for number in re.findall(r"(\d+) frames?", question.text)]
    assert promised == ([len(shown)] if variant in ("reorder", "interval") else [len(shown), len(asked)])
    assert not re.search(r"\b1 frames|\b(?:[2-9]|\d\d+) frame\b", question.text)
    if variant == "interval":
        assert (asked, shown) == ([], list(range(length)))
        assert spell_seconds(interval) in answer.text
        assert all(part.fps is None for part in question.parts if isinstance(part, VideoPart))
    else:
        assert not answer.text
        assert asked


@given(length=st.integers(2, 60), seed=SEEDS)
def test_which_frames_each_variant_asks_for(length: int, seed: int):
    forward, completion, reverse = (plan_frames(variant, length, rng(seed)) for variant in ("forward", "completion", "reverse"))
    assert [*forward.shown, *forward.asked] == [*completion.shown, *completion.asked] == list(range(length))
    assert 1 <= len(forward.asked) <= MAX_PREDICTED
    assert len(completion.shown) >= len(completion.asked) >= 1
    assert [*reverse.shown, *reverse.asked] == list(range(length))[::-1]
    assert 1 <= len(reverse.asked) <= MAX_PREDICTED
    if length >= 3:
        fill_in, reorder = plan_frames("fill_in", length, rng(seed)), plan_frames("reorder", length, rng(seed))
        assert [number + 1 for number in fill_in.shown[:-1]] == [number - 1 for number in fill_in.shown[1:]] == list(fill_in.asked)
        assert fill_in.shown[0] == 0
        assert fill_in.shown[-1] in (length - 1, length - 2)
        assert list(reorder.asked) == sorted(reorder.shown) != list(reorder.shown)
        assert len(reorder.asked) == min(length, MAX_SHUFFLED)
        assert reorder.asked[-1] - reorder.asked[0] == len(reorder.asked) - 1


def test_all_variants_are_drawn_where_possible_and_none_where_not():
    kinds = {pure_video(PureVideo(frames=clip(6), interval=1.0, **NAMES), rng(seed)).messages[0].text.split()[0] for seed in range(200)}
    assert len(kinds) >= 6
    assert possible_variants(6, has_interval=False) == tuple(variant for variant in VARIANTS if variant != "interval")
    assert possible_variants(2, has_interval=True) == ("forward", "completion", "reverse", "interval")
    assert possible_variants(1, has_interval=True) == ()
    for frames, interval in ((1, 1.0), (0, None)):
        with pytest.raises(RecordError, match="Sample the clip more densely"):
            pure_video(PureVideo(frames=clip(frames), interval=interval, **NAMES), rng())
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecordError, match="an interval of"):
            pure_video(PureVideo(frames=clip(3), interval=wrong, **NAMES), rng())


def test_frames_out_of_time_are_single_images_and_a_video_knows_its_rate():
    row = PureVideo(frames=clip(5), interval=0.5, **NAMES)
    for variant, parts, fps in (("forward", 1, 2.0), ("fill_in", 1, 1.0), ("reorder", 5, None)):
        *shown, text = pure_video(row, rng(3), variants=[variant]).messages[0].parts
        assert isinstance(text, TextPart)
        assert len(shown) == parts
        assert [part.fps for part in shown if isinstance(part, VideoPart)] == ([fps] if fps else [])


def test_seconds_are_spelt_with_two_digits():
    spelt = [spell_seconds(seconds) for seconds in (1, 0.996, 0.2513, 2, 9.96, 0.1)]
    assert spelt == ["1 second", "1 second", "0.25 seconds", "2 seconds", "10 seconds", "0.1 seconds"]


# --- visual thinking


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@given(seed=SEEDS)
def test_thinking_shows_the_key_region_between_words_and_answer(seed: int):
    row = VisualThinking(image=picture(), question="What colour?", answer="Red.", key=Box(50, 40, 90, 60), **NAMES)
    example = visual_thinking(row, rng(seed))
    assert roles_and_parts(example) == [("user", ["ImagePart", "TextPart"]), ("assistant", ["TextPart", "ImagePart", "TextPart"])]
    words, key, answer = example.messages[1].parts
    assert isinstance(words, TextPart)
    assert words.text in DEFAULT.thinking.reply.sentences
    assert answer == TextPart("Red.")
    assert isinstance(key, ImagePart)
    assert key.image == picture().crop((46, 36, 94, 64))  # a tenth of the longer side, 40 pixels, on every side
    request = said(example)[0].removeprefix("What colour?").strip()
    assert request in ("", *DEFAULT.thinking.request.sentences)
    assert example == visual_thinking(row, rng(seed))


def test_thinking_is_asked_for_as_often_as_is_said():
    row = VisualThinking(image=Path("a.png"), question="Why?", answer="So.", key=Path("b.png"), **NAMES)

    def count(share: float) -> int:
        return sum(said(visual_thinking(row, rng(seed), asked_share=share))[0] != "Why?" for seed in range(300))

    assert (count(0.0), count(1.0)) == (0, 300)
    assert 120 <= count(0.5) <= 180


def test_objects_are_boxed_and_named():
    objects = (NamedBox("dog", Box(10, 50, 60, 100)), NamedBox("red ball", Box(120, 5, 260, 60)), NamedBox("dog", Box(70, 70, 90, 90)))
    row = VisualThinking(image=picture(), question="Where?", answer="Left.", key=objects, **NAMES)
    texts = {said(visual_thinking(row, rng(seed)))[1] for seed in range(30)}
    assert "I will think about it visually and mark dog and red ballLeft." in texts
    drawn = draw_boxes(picture(), objects)
    assert drawn == draw_boxes(picture(), objects)
    for colour, corner in zip(COLOURS, ((10, 99), (199, 59), (70, 89)), strict=False):
        assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel(corner)) == colour  # pyright: ignore
    assert drawn.getpixel((30, 75)) == picture().getpixel((30, 75))
    label = np.asarray(drawn)[30:50, 10:30].reshape(-1, 3)
    assert (label > 200).all(axis=1).sum() > 10  # white letters above the box


@given(
    left=st.floats(-50, 250), top=st.floats(-50, 150), width=st.floats(0.01, 300), height=st.floats(0.01, 300), padding=st.floats(0, 1)
)  # fmt: skip
def test_a_crop_lies_within_the_image_and_holds_its_box(left: float, top: float, width: float, height: float, padding: float):
    box = Box(left, top, left + width, top + height)
    if left >= 200 or top >= 120 or box.right <= 0 or box.bottom <= 0:
        with pytest.raises(RecordError, match="the image is 200 x 120 pixels"):
            crop_region(picture(), box, padding=padding)
        return
    cropped = crop_region(picture(), box, padding=padding)
    assert min(cropped.size) >= 1
    assert int(min(200, box.right) - max(0, left)) <= cropped.width <= min(200, width + 2 * padding * max(width, height) + 2)
    assert int(min(120, box.bottom) - max(0, top)) <= cropped.height <= min(120, height + 2 * padding * max(width, height) + 2)


def test_boxes_that_are_none_are_refused():
    for sides in ((5, 5, 5, 9), (9, 5, 5, 9), (0, 0, float("nan"), 1), (0, 0, float("inf"), 1)):
        for draw in (lambda box: crop_region(picture(), box), lambda box: draw_boxes(picture(), [NamedBox("dog", box)])):
            with pytest.raises(RecordError, match="left < right"):
                draw(Box(*sides))
    with pytest.raises(RecordError, match="blank name"):
        draw_boxes(picture(), [NamedBox(" ", Box(0, 0, 5, 5))])
    with pytest.raises(RecordError, match="0 objects"):
        draw_boxes(picture(), [])
    with pytest.raises(MediaError, match=r"missing.png"):
        crop_region(Path("missing.png"), Box(0, 0, 5, 5))
    assert Box.enclosing([Box(1, 2, 3, 4), Box(0, 3, 2, 9)]) == Box(0, 2, 3, 9)


# --- wording


def test_a_file_of_ones_own_changes_what_it_names(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[generation]\nrequest = ["Paint {caption} {{please}}"]\n[edit]\nreply = ["Done:"]\n', encoding="utf-8")
    mine = load_phrasings(path)
    assert said(generation(Generation(image=Path("a.png"), caption="a dog", **NAMES), rng(), mine))[0] == "Paint a dog {please}"
    row = ImageToImage(source_image=Path("a.png"), target_image=Path("b.png"), instruction="Turn it.", **NAMES)
    assert roles_and_parts(image_to_image(row, rng(), mine))[1] == ("assistant", ["TextPart", "ImagePart"])
    assert mine.generation.reply == DEFAULT.generation.reply
    assert mine.frames == DEFAULT.frames
    assert load_phrasings() is DEFAULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[generation]\nrequest = ["Draw it"]', r"without \{caption\} .*generation\] request, sentence 1 of 1"),
        ('[generation]\nrequest = ["Draw {caption}", "Draw {captoin} {caption}"]', r"with \{captoin\} but \{caption\} .*sentence 2 of 2"),
        ('[generation]\nrequest = ["{caption.__class__}"]', "a bare name in braces"),
        ('[generation]\nrequest = ["{caption!r}"]', "a bare name in braces"),
        ('[generation]\nrequest = ["{caption} {"]', "loose brace"),
        ('[generation]\nreply = ["Here is {caption}"]', "no placeholders can be filled in"),
        ('[generation]\nreply = [" "]', "some text is needed"),
        ("[generation]\nreply = []", "at least 1 sentence"),
        ('[generation]\nreply = "Here"', "a list of at least 1 sentence"),
        ("[generation]\nreply = [3]", "some text is needed"),
        ('[generation]\nreplies = ["Here"]', "Did you mean 'reply'"),
        ('[generatoin]\nreply = ["Here"]', "Did you mean 'generation'"),
        ("generation = 3", "a section of entries is needed"),
        ("[generation", "no TOML"),
        ('[frames]\nforward = ["Go on with {asked}."]', r"without \{shown\}"),
    ],
)
def test_wording_that_cannot_work_is_refused_on_load(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_phrasings(path)


def test_a_wording_file_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing.toml"):
        load_phrasings(tmp_path / "nothing.toml")
