"""Published chat templates with tokenizers of their own kind: targets are what was said, and prompts in training are those in use."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tests.families import LLMS, template

from metamorph.batch import IGNORE_INDEX
from metamorph.errors import TemplateError
from metamorph.messages import Message
from metamorph.model import MetaMorphProcessor
from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN
from metamorph.model.conversation import _with_fixed_date
from metamorph.model.processing import check_template

K = 4
ALL = [*LLMS, "llama-3.2", "mistral-v0.2", "smollm3-dated"]
KIND_OF = {"llama-3.2": "llama", "mistral-v0.2": "mistral", "smollm3-dated": "smollm3"}  # whose tokenizer


def make(name: str, **settings) -> MetaMorphProcessor:
    from transformers import AddedToken

    family = LLMS[KIND_OF.get(name, name)]
    tokenizer = family.tokenizer(family.specials)
    tokens = [IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    source = template(name if name in KIND_OF else family.template)
    return MetaMorphProcessor(tokenizer, num_visual_tokens=K, image_size=(8, 8), chat_template=source, **settings)


@pytest.fixture(scope="module", params=ALL)
def named(request):
    return request.param, make(request.param)


def end_of_turn(name: str) -> str:
    return LLMS[KIND_OF.get(name, name)].end_of_turn


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def targets(processor: MetaMorphProcessor, sequence) -> list[str]:
    """The decoded targets of each answer: runs of labels, which visual tokens do not interrupt."""
    runs, run = [], []
    for label, visual in zip(sequence.labels.tolist(), sequence.is_visual.tolist(), strict=True):
        if label != IGNORE_INDEX:
            run.append(label)
        elif run and not visual:
            runs.append(run)
            run = []
    # Decoded behind another token, for some tokenizers swallow a space where a text begins.
    first = processor.image_end_id
    return [processor.decode([first, *run]).removeprefix(IMAGE_END_TOKEN) for run in [*runs, run] if run]


def as_said(name: str, *answers: str) -> list[str]:
    """What the targets must be; Mistral's template writes a space before every answer, for the model to say."""
    return [" " * (name == "mistral") + answer + end_of_turn(name) for answer in answers]


TALK = [
    Message.user(picture(), "What is this? Draw it, please!"),
    Message.assistant("A red star:", picture("blue"), "Anything else?"),
    Message.user("And", picture("lime"), "now?"),
    Message.assistant(picture("red"), "blue green 12\n\nOne more: ünï ✓"),
    Message.user("Only words."),
    Message.assistant("  two spaces before"),
]
SAID = [
    "A red star:<image_start><image_end>Anything else?",
    "<image_start><image_end>blue green 12\n\nOne more: ünï ✓",
    "  two spaces before",
]


def test_targets_are_exactly_what_the_assistant_said_and_its_end_of_turn(named):
    name, processor = named
    sequence = processor.encode(TALK)
    assert targets(processor, sequence) == as_said(name, *SAID)
    assert sequence.visual_targets.tolist() == [False, True, False, True]
    assert check_template(processor) == processor.tokenizer.convert_tokens_to_ids(end_of_turn(name))


def test_a_prompt_in_use_is_the_beginning_of_the_sequence_in_training(named):
    _, processor = named
    whole = processor.encode(TALK).input_ids
    for turns in (1, 3, 5):
        prompt = processor.encode(TALK[:turns], add_generation_prompt=True)
        assert torch.equal(whole[: len(prompt)], prompt.input_ids)
        label = processor.encode(TALK[: turns + 1]).labels
        assert (label[: len(prompt)] == processor.encode(TALK).labels[: len(prompt)]).all()
        assert label[len(prompt)] != IGNORE_INDEX  # the answer is a target from its first token on
        assert processor.encode(TALK[: turns + 1]).input_ids.tolist() == whole[: len(label)].tolist()


def test_the_beginning_of_sequence_stands_once_and_first(named):
    name, processor = named
    bos = LLMS[KIND_OF.get(name, name)].bos
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.encode(TALK).input_ids.tolist())
    known = {"<|begin_of_text|>", "<bos>", "<s>"}
    assert [token for token in tokens if token in known] == ([] if bos is None else [bos])
    assert bos is None or tokens[0] == bos


@pytest.mark.parametrize("turns", [1, 2])
def test_text_without_images_is_tokenized_as_transformers_does(named, turns):
    """Except where a template rewrites what came before: Qwen3 shows its thinking block in the last answer only."""
    name, processor = named
    if name == "qwen3" and turns == 2:
        return
    words = [("user", "What is this?"), ("assistant", "A small red star"), ("user", "And now?"), ("assistant", "blue green 12")][
        : 2 * turns
    ]
    plain = processor.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in words],
        chat_template=_with_fixed_date(processor.chat_template),
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert processor.encode([getattr(Message, role)(text) for role, text in words]).input_ids.tolist() == plain


SPELLED = ["<image>", "a<image_start>b", "<image_end>", "x<|im_end|>\n<|im_start|>system"]
SPELLED += ["<|eot_id|>", "<end_of_turn>", " [/INST]", "</s> <s>"]


@pytest.mark.parametrize("text", SPELLED)
def test_text_that_spells_special_tokens_stays_text(named, text):
    name, processor = named
    special = torch.tensor(sorted(processor._special.ids))
    ordinary = processor.encode([Message.user("blue", picture()), Message.assistant("green")]).input_ids
    spelled = processor.encode([Message.user(text, picture()), Message.assistant(text)])
    assert spelled.input_ids[torch.isin(spelled.input_ids, special)].tolist() == ordinary[torch.isin(ordinary, special)].tolist()
    assert processor.decode(spelled.input_ids[~spelled.is_visual]).count(text) == 2 + template_says(processor, text)
    assert int(spelled.is_visual.sum()) == K
    assert targets(processor, spelled) == as_said(name, text)


def template_says(processor: MetaMorphProcessor, text: str) -> int:
    """How often a conversation about something else has these words: turns of the template itself."""
    sequence = processor.encode([Message.user("blue", picture()), Message.assistant("green")])
    return processor.decode(sequence.input_ids[~sequence.is_visual]).count(text)


SYSTEM = [Message.system("Be brief."), Message.user("What is this?"), Message.assistant("A star")]


def test_a_system_turn_is_written_or_refused_with_the_templates_own_words(named):
    name, processor = named
    reasons = {"gemma": "System role not supported", "gemma2": "System role not supported", "mistral-v0.2": "roles must alternate"}
    if name in reasons:
        with pytest.raises(TemplateError, match=rf"{reasons[name]}.* but turns system, user(, assistant)? were to be written \(row 3\)"):
            processor.encode(SYSTEM, id="row 3")
        return
    text = processor.decode(processor.encode(SYSTEM).input_ids)
    assert text.count("Be brief.") == 1
    prompt = processor.encode(SYSTEM[:2], add_generation_prompt=True).input_ids
    assert torch.equal(processor.encode(SYSTEM).input_ids[: len(prompt)], prompt)
    assert targets(processor, processor.encode(SYSTEM)) == as_said(name, "A star")


def test_a_system_turn_that_moves_to_the_last_question_is_refused_once_there_are_two():
    with pytest.raises(TemplateError, match="in order were expected"):
        make("mistral").encode([*SYSTEM, Message.user("And now?"), Message.assistant("Two")])


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "smollm3-dated"])
def test_an_empty_thinking_block_belongs_to_every_prompt_and_to_no_target(name):
    processor = make(name)
    text = processor.decode(processor.encode(TALK).input_ids)
    assert text.count("<think>") == text.count("</think>") == 3
    assert not any("think" in words for words in targets(processor, processor.encode(TALK)))
    prompt = processor.decode(processor.encode(TALK[:1], add_generation_prompt=True).input_ids)
    assert prompt.rstrip().endswith("</think>")


def test_what_an_assistant_thought_aloud_is_kept_in_every_turn():
    """Qwen3's own template would drop it from the first answer: it never sees what people said."""
    processor = make("qwen3")
    thought = "<think>\nhm\n</think>\n\nA star"
    talk = [Message.user("a"), Message.assistant(thought), Message.user("b"), Message.assistant(thought)]
    assert targets(processor, processor.encode(talk)) == [thought + "<|im_end|>"] * 2


def test_thinking_can_be_asked_for_where_the_template_then_still_shows_the_answers():
    assert check_template(make("smollm3-dated", template_variables={"enable_thinking": True}))
    with pytest.raises(TemplateError, match="<think>"):
        check_template(make("qwen3", template_variables={"enable_thinking": True}))


@pytest.mark.parametrize("name", ["llama", "llama-3.2", "smollm3-dated"])
def test_a_date_in_the_template_is_the_same_every_day(name):
    text = make(name).decode(make(name).encode(TALK[:2]).input_ids)
    assert "Today Date: 26 Jul" in text
    if name != "smollm3-dated":
        dated = make(name, template_variables={"date_string": "01 Jan 2030"})
        assert "Today Date: 01 Jan 2030" in dated.decode(dated.encode(TALK[:2]).input_ids)


def test_template_variables_are_saved(tmp_path):
    processor = make("llama", template_variables={"date_string": "01 Jan 2030"})
    processor.save_pretrained(tmp_path)
    loaded = MetaMorphProcessor.from_pretrained(tmp_path)
    assert loaded.template_variables == {"date_string": "01 Jan 2030"}
    assert torch.equal(loaded.encode(TALK).input_ids, processor.encode(TALK).input_ids)


def test_threads_may_encode_at_the_same_time():
    """A compiled template with `{% generation %}` blocks keeps state while it is written, and every thread uses the same one."""
    from concurrent.futures import ThreadPoolExecutor

    processor = make("smollm3-dated")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: processor.encode(TALK[2:]).labels.tolist(), range(60)))
    assert all(labels == found[0] for labels in found)
