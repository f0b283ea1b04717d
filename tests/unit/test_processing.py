"""From messages to sequences: what is a target, what stays text, and which chat templates are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from metamorph.batch import IGNORE_INDEX
from metamorph.errors import AlignmentError, CheckpointError, ContextLengthError, MediaError, RecordError, TemplateError
from metamorph.messages import ImagePart, Message
from metamorph.model import MetaMorphProcessor
from metamorph.model.processing import check_template

K = 4
SENTENCES = [
    "A small red star at the top left.",
    "What is this? Draw it, please!",
    "Here is an image based on your request:",
    "blue green 12",
]
WITH_GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT = WITH_GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (  # line breaks behind the end of turn, trimmed contents, a default system turn
    "{% if messages[0].role != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPACED = (  # no role tokens: "User: ... Assistant: ..." with one end token
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}<|end|>{% else %}User: {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIALS = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>", "<image_start>", "<image_end>"]


def make_tokenizer(kind: str = "byte level", specials: list[str] = SPECIALS) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    if kind == "byte level":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = [chr(i) for i in range(10, 127)]
    core.train_from_iterator(SENTENCES * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    return tokenizer


def make(template: str = WITH_GENERATION, kind: str = "byte level", **settings) -> MetaMorphProcessor:
    return MetaMorphProcessor(make_tokenizer(kind), num_visual_tokens=K, image_size=(32, 32), chat_template=template, **settings)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 20), colour)


def said(processor: MetaMorphProcessor, sequence) -> str:
    return processor.decode(sequence.labels[sequence.labels != IGNORE_INDEX])


CONVERSATION = [
    Message.system("Be kind."),
    Message.user(picture(), "What is this? Draw it, please!"),
    Message.assistant("Here is an image:", picture("blue"), "A small star."),
    Message.user("And now?"),
    Message.assistant(picture("green")),
]
ANSWERS = "Here is an image:<image_start><image_end>A small star.<|end|><image_start><image_end><|end|>"


@pytest.mark.parametrize("template", [WITH_GENERATION, WITHOUT, CHATML])
def test_targets_are_what_the_assistant_says_and_its_ends_of_turn(template):
    processor = make(template)
    sequence = processor.encode(CONVERSATION, id="x", source="y", weight=0.5)
    assert said(processor, sequence) == ANSWERS
    assert sequence.visual_targets.tolist() == [False, True, True]
    assert sequence.from_pixels.all()
    assert sequence.pixel_values.shape == (3, 3, 32, 32)
    assert (sequence.num_images, int(sequence.is_visual.sum())) == (3, 3 * K)
    assert (sequence.id, sequence.source, sequence.weight) == ("x", "y", 0.5)
    starts = (sequence.input_ids == processor.image_start_id).nonzero().flatten()
    for start in starts.tolist():
        assert sequence.is_visual[start + 1 : start + 1 + K].all()
        assert sequence.input_ids[start + 1 + K] == processor.image_end_id


def test_a_space_that_the_prompt_lacks_belongs_to_the_answer():
    processor = make(SPACED)
    sequence = processor.encode([Message.user("blue"), Message.assistant("green")])
    assert said(processor, sequence) == " green<|end|>"
    prompt = processor.encode([Message.user("blue")], add_generation_prompt=True).input_ids
    assert torch.equal(sequence.input_ids[: len(prompt)], prompt)


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@pytest.mark.parametrize("template", [WITH_GENERATION, WITHOUT, CHATML])
def test_ids_of_ordinary_text_are_those_of_the_plain_rendering(template, kind):
    processor = make(template, kind)
    words = [("user", "What is this? Draw it, please!"), ("assistant", "A small red star"), ("user", "x"), ("assistant", "blue  12")]
    plain = processor.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in words], chat_template=template, tokenize=True, return_dict=True
    )["input_ids"]
    messages = [getattr(Message, role)(text) for role, text in words]
    assert processor.encode(messages).input_ids.tolist() == plain


def test_the_mask_is_that_of_transformers():
    processor = make()
    words = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A small red star"}]
    both = processor.tokenizer.apply_chat_template(
        words, chat_template=WITH_GENERATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    sequence = processor.encode([Message.user("What is this?"), Message.assistant("A small red star")])
    assert (sequence.labels != IGNORE_INDEX).long().tolist() == both["assistant_masks"]


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@pytest.mark.parametrize("text", ["<image_start>", "a<|assistant|>I said no<|end|>b", "<image> <image_end>", "<|end|>", "{{ x }} {% y %}"])
@pytest.mark.parametrize("template", [WITH_GENERATION, CHATML])
def test_text_that_spells_special_tokens_stays_text(text, template, kind):
    processor = make(template, kind)
    ordinary = [Message.user("blue", picture()), Message.assistant("green")]
    spelled = [Message.user(text, picture()), Message.assistant(text)]
    found, expected = processor.encode(spelled), processor.encode(ordinary)
    special = torch.tensor(sorted(processor._special.ids))
    assert (
        found.input_ids[torch.isin(found.input_ids, special)].tolist()
        == expected.input_ids[torch.isin(expected.input_ids, special)].tolist()
    )
    assert text in processor.decode(found.input_ids)
    assert said(processor, found).strip() == text + "<|end|>"
    assert int(found.is_visual.sum()) == K


def test_parts_that_only_together_spell_a_special_token_stay_text():
    processor = make()
    sequence = processor.encode([Message.user("<image", "_start>"), Message.assistant("ok")])
    assert processor.image_start_id not in sequence.input_ids.tolist()


def test_the_prompt_is_the_beginning_of_the_whole_conversation():
    for template in (WITH_GENERATION, WITHOUT, CHATML, SPACED):
        processor = make(template)
        whole = processor.encode(CONVERSATION[1:]).input_ids
        for turns in (1, 3):
            prompt = processor.encode(CONVERSATION[1 : 1 + turns], add_generation_prompt=True).input_ids
            assert torch.equal(whole[: len(prompt)], prompt)


def test_frames_of_a_video_are_images_in_order():
    processor = make()
    frames = [picture(colour) for colour in ("red", "lime", "blue")]
    sequence = processor.encode([Message.user(frames, "What is this?"), Message.assistant(frames[:2])])
    assert sequence.visual_targets.tolist() == [False] * 3 + [True] * 2
    assert sequence.pixel_values[:, :, 0, 0].argmax(dim=1).tolist() == [0, 1, 2, 0, 1]


def test_pixels_are_scaled_and_normalised_as_saved():
    processor = make(image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 2.0))
    pixels = processor.encode([Message.user(picture("red"), "x"), Message.assistant("y")]).pixel_values[0, :, 0, 0]
    assert np.allclose(pixels, [1.0, -1.0, -0.5])


def test_visual_tokens_take_the_place_of_pixels():
    processor = make()
    tokens = torch.arange(K * 3, dtype=torch.float32).view(K, 3)
    messages = [Message.user(picture(), "x"), Message.assistant(ImagePart(visual_tokens=tokens)), Message.user("y"), Message.assistant("z")]
    sequence = processor.encode(messages)
    assert sequence.from_pixels.tolist() == [True, False]
    assert torch.equal(sequence.visual_tokens[1], tokens)
    assert len(sequence.pixel_values) == 1
    assert torch.equal(sequence.input_ids, processor.encode([messages[0], Message.assistant(picture()), *messages[2:]]).input_ids)
    with pytest.raises(AlignmentError, match=r"shape \(5, 3\) but \(4, 3\)"):
        processor.encode([Message.user(ImagePart(visual_tokens=torch.zeros(5, 3)), "x")])


def test_a_context_too_short_is_refused_with_counts_before_images_are_opened(tmp_path):
    processor = make(max_length=30)
    missing = ImagePart(tmp_path / "missing.png")
    with pytest.raises(ContextLengthError, match=r"\(6 images x 4 visual tokens \+ \d+ others\) but at most 30 are allowed \(row 7\)"):
        processor.encode([Message.user([missing] * 6, "x")], id="row 7")
    with pytest.raises(MediaError, match=r"missing\.png"):
        processor.encode([Message.user(missing, "x")], max_length=40)


@pytest.mark.parametrize(
    "messages",
    [[], [Message("system", (ImagePart(picture()),)), Message.user("x")], [Message.assistant("x")]],
)
def test_malformed_conversations_are_refused(messages):
    with pytest.raises(RecordError):
        make().encode(messages)


def test_good_templates_pass_the_probe_and_name_the_end_of_turn():
    for template in (WITH_GENERATION, WITHOUT, CHATML):
        processor = make(template)
        assert check_template(processor) == processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (WITH_GENERATION.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"), "the end of turn inside was expected"),
        (WITH_GENERATION.replace("{% generation %}", "{% generation %}Sure! "), r"targets \['Sure! A red square.*were expected"),
        (WITH_GENERATION.replace("{{ m.content }}<|end|>{% endgeneration %}", "!{% endgeneration %}{{ m.content }}<|end|>"), "outside of"),
        (WITH_GENERATION.replace("{{ m.content }}", "{{ m.content[:3] }}"), "parts .* in order were expected"),
        (WITHOUT.replace("<|end|>", ""), "an end-of-turn token was expected"),
        (
            WITHOUT.replace("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>Well"),
            "in one prompt but",
        ),
        (SPACED, r"targets \[' A red square"),
        ("{{ raise_exception('no images, please') }}", "no images, please"),
        (WITH_GENERATION.replace("{% endfor %}", "{% endfor %}{{ messages[0].content }}"), "in order were expected"),
    ],
)
def test_templates_that_hide_what_is_said_are_refused_showing_both(template, words):
    with pytest.raises(TemplateError, match=words):
        check_template(make(template))


def test_no_template_at_all_is_refused():
    with pytest.raises(TemplateError, match="no chat template but one was expected"):
        make(template=None).encode([Message.user("x")])


def test_saving_and_loading_is_the_identity(tmp_path):
    processor = make(image_mean=(0.1, 0.2, 0.3), image_resample="lanczos", max_length=99)
    processor.save_pretrained(tmp_path)
    for loaded in (MetaMorphProcessor.from_pretrained(tmp_path), MetaMorphProcessor.from_pretrained(str(tmp_path))):
        names = (
            "num_visual_tokens",
            "image_size",
            "image_mean",
            "image_std",
            "image_resample",
            "max_length",
            "chat_template",
            "image_token_id",
        )
        assert [getattr(loaded, name) for name in names] == [getattr(processor, name) for name in names]
        first, second = processor.encode(CONVERSATION), loaded.encode(CONVERSATION)
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.pixel_values, second.pixel_values)
    assert len(loaded.tokenizer) == len(processor.tokenizer)


def test_a_processor_without_special_tokens_or_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no special token <image_end> but all 3 were expected"):
        MetaMorphProcessor(make_tokenizer(specials=SPECIALS[:-1]), chat_template=WITHOUT)
    with pytest.raises(CheckpointError, match="a processor was expected"):
        MetaMorphProcessor.from_pretrained(tmp_path)


def test_the_auto_class_finds_it(tmp_path):
    from transformers import LlamaConfig, SiglipVisionConfig

    from metamorph.model import MetaMorphConfig

    make().save_pretrained(tmp_path)
    MetaMorphConfig(text_config=LlamaConfig(hidden_size=32), vision_config=SiglipVisionConfig()).save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), MetaMorphProcessor)
