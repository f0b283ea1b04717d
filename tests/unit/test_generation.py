"""Generation against its slow twin, and the promises that a serving engine will build on."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.reference import reference_generate
from tests.tiny import make_eager_to_draw, save_parts, tiny_tokenizer

from metamorph.errors import ConfigError, ContextLengthError
from metamorph.messages import ImagePart, Message
from metamorph.model.conversion import initialize
from metamorph.model.events import Answer, Detokenizer, End, EventWriter, ImageEnd, ImageStart, TextDelta, VisualToken
from metamorph.model.generation import generate, left_pad, prefill, step, stream, vocabulary_of
from metamorph.model.sampling import choose_tokens
from metamorph.model.state import DecodingOptions, Slot, Vocabulary, drop_finished, join, keep_rows

K = 4
SEEDS = [11, 12, 13, 14, 15]
GREEDY = DecodingOptions(max_new_tokens=24)
SAMPLED = DecodingOptions(max_new_tokens=24, temperature=1.0, top_k=60, top_p=0.95, repetition_penalty=1.3)
FREE_END = DecodingOptions(max_new_tokens=24, temperature=1.0, force_image_end=False, max_images=6)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    model, processor = initialize(*save_parts(tmp_path_factory.mktemp("parts")), num_visual_tokens=K)
    make_eager_to_draw(model)
    return model.eval(), processor


def picture(colour) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


@pytest.fixture(scope="module")
def prompts(parts):
    """Every kind of prompt: text, an image, frames with a system turn, two images, and visual tokens of a drawn image."""
    _, processor = parts
    png = io.BytesIO()
    picture("blue").save(png, format="PNG")
    drawn = torch.nn.functional.normalize(torch.randn(K, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    conversations = [
        [Message.user("hi")],
        [Message.user(picture("red"), "What is this?")],
        [Message.system("Be brief."), Message.user([picture("red"), picture("green")], "What happens?")],
        [Message.user("Compare ", picture("red"), " with ", png.getvalue())],
        [
            Message.user("Draw."),
            Message.assistant("Here:", ImagePart(visual_tokens=drawn)),
            Message.user("What did you draw?", picture("red")),
        ],
    ]
    return [processor.encode(messages, add_generation_prompt=True, id=f"prompt {i}") for i, messages in enumerate(conversations)]


@pytest.fixture(scope="module")
def sampled(parts, prompts) -> list[Answer]:
    return generate(*parts, prompts, SAMPLED, seeds=SEEDS)


def assert_same(answer: Answer, other, tolerance: float = 1e-4) -> None:
    """Equal ids and reason, visual tokens within the tolerance; the other one may be a twin's answer."""
    images = getattr(other, "images", None)
    images = other.visual_tokens if images is None else images
    assert list(answer.token_ids) == list(other.token_ids)
    assert answer.reason == other.reason
    assert len(answer.visual_tokens) == len(images)
    for ours, theirs in zip(answer.visual_tokens, images, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, FREE_END], ids=["greedy", "sampled", "free end"])
def test_batch_equals_the_slow_twin(parts, prompts, options):
    answers = generate(*parts, prompts, options, seeds=SEEDS)
    for answer, prompt, seed in zip(answers, prompts, SEEDS, strict=True):
        assert_same(answer, reference_generate(*parts, prompt, options, seed))
    assert sum(len(answer.visual_tokens) for answer in answers) >= 5  # the test is about images too
    assert any(answer.text for answer in answers)


def test_answers_do_not_depend_on_the_batch(parts, prompts, sampled):
    two_at_a_time = generate(*parts, prompts, SAMPLED, seeds=SEEDS, max_rows=2)
    turned = generate(*parts, prompts[::-1], SAMPLED, seeds=SEEDS[::-1])[::-1]
    for answer, *others in zip(sampled, two_at_a_time, turned, strict=True):
        for other in others:
            assert_same(answer, other)
    assert_same(sampled[4], generate(*parts, prompts[4:], SAMPLED, seeds=SEEDS[4])[0])


def test_each_row_has_its_own_options(parts, prompts):
    several = [GREEDY, SAMPLED, FREE_END, GREEDY.updated(allow_images=False), SAMPLED.updated(max_new_tokens=7)]
    for i, answer in enumerate(generate(*parts, prompts, several, seeds=SEEDS)):
        assert_same(answer, generate(*parts, [prompts[i]], several[i], seeds=SEEDS[i])[0])


def test_seeds_decide_what_is_sampled(parts, prompts):
    first, again, other = (generate(*parts, prompts[:1], SAMPLED, seeds=seed)[0] for seed in (1, 1, 2))
    assert first.token_ids == again.token_ids != other.token_ids


def test_rows_write_and_draw_in_the_same_step_and_drawing_rows_skip_the_text_head(parts, prompts):
    model, processor = parts
    vocabulary, head_rows = vocabulary_of(model, processor), []
    state = prefill(model, prompts, vocabulary, SAMPLED, seeds=SEEDS)
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: head_rows.append(len(inputs[0])))
    mixed = 0
    try:
        while not state.finished:
            head_rows.clear()
            choosing = [s for s in state.slots if s.finished is None and s.mode == "text"]
            state, said = step(model, state)
            assert sum(head_rows) == len(choosing)
            mixed += 0 < sum(emission.visual_token is not None for emission in said) < len(said)
    finally:
        hook.remove()
    assert mixed > 2


def test_a_step_changes_nothing_in_place(parts, prompts):
    model, processor = parts
    state, _ = step(model, prefill(model, prompts, vocabulary_of(model, processor), SAMPLED, seeds=SEEDS))
    kept = (state.slots, state.hidden.clone(), state.attention_mask.clone(), [layer.keys.clone() for layer in state.cache.layers])
    first, said = step(model, state)
    second, said_again = step(model, state)
    assert [e.token_id for e in said] == [e.token_id for e in said_again]
    assert first.slots == second.slots != state.slots
    assert torch.equal(first.hidden, second.hidden)
    assert (state.slots, state.cache.get_seq_length()) == (kept[0], kept[3][0].shape[-2])
    assert torch.equal(state.hidden, kept[1])
    assert torch.equal(state.attention_mask, kept[2])
    assert all(torch.equal(layer.keys, before) for layer, before in zip(state.cache.layers, kept[3], strict=True))


def test_rows_join_and_leave_midway(parts, prompts, sampled):
    model, processor = parts
    vocabulary = vocabulary_of(model, processor)
    writers = [EventWriter(processor.tokenizer, vocabulary) for _ in prompts]
    events = [[] for _ in prompts]

    def advance(state, steps):
        for _ in range(steps):
            state, emissions = step(model, state)
            for emission in emissions:
                events[emission.key] += writers[emission.key].write(emission)
        return state

    def arrive(keys):
        return prefill(model, [prompts[k] for k in keys], vocabulary, SAMPLED, seeds=[SEEDS[k] for k in keys], keys=keys)

    state = advance(arrive([0, 3]), 5)
    state = advance(join(state, arrive([1])), 3)
    state = advance(join(arrive([4, 2]), state), 2)
    gone = [row for row, slot in enumerate(state.slots) if slot.key != 3]  # row 3 leaves before it has finished
    state = keep_rows(state, gone)
    while not state.finished:
        state = drop_finished(advance(state, 1)) if not state.finished else state
    for key in (0, 1, 2, 4):
        assert_same(Answer.of(events[key]), sampled[key])
    assert 0 < len(events[3]) < len(sampled[3].events)


def test_leaving_frees_the_columns_that_nobody_needs(parts, prompts):
    model, processor = parts
    state = prefill(model, prompts, vocabulary_of(model, processor))
    short = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    left = keep_rows(state, [short])
    assert left.cache.get_seq_length() == left.attention_mask.shape[1] == len(prompts[short])
    assert left.attention_mask.all()


def test_rows_with_the_same_key_cannot_join(parts, prompts):
    model, processor = parts
    state = prefill(model, prompts[:1], vocabulary_of(model, processor))
    with pytest.raises(ConfigError, match=r"keys \[0\] in both"):
        join(state, state)


@pytest.mark.parametrize("limit", [1, K + 1, K + 2, 2 * K + 3, 2 * K + 4])
def test_an_image_is_begun_only_if_it_fits(parts, prompts, limit):
    for options in (DecodingOptions(max_new_tokens=limit), DecodingOptions(max_new_tokens=limit, temperature=1.0, force_image_end=False)):
        for answer in generate(*parts, prompts, options, seeds=SEEDS):
            begun = sum(isinstance(event, ImageStart) for event in answer.events)
            longest = K + 2 if options.force_image_end else K + 1  # where the end is free it may go unsaid
            assert begun == len(answer.visual_tokens) <= limit // longest
            assert len(answer.token_ids) + K * begun <= limit
            assert answer.reason == "eos" or len(answer.token_ids) + K * begun == limit


def test_an_answer_stays_within_the_context(parts):
    model, processor = parts
    context = model.config.text_config.max_position_embeddings
    frame = processor.encode([Message.user("x")], add_generation_prompt=True)
    for left in (1, K + 1, K + 2, 3 * K):
        prompt = processor.encode([Message.user("x" * (context - left - len(frame) + 1))], add_generation_prompt=True)
        assert len(prompt) == context - left
        answer = generate(model, processor, [prompt], DecodingOptions(max_new_tokens=500, allow_images=True))[0]
        said = len(answer.token_ids) + K * len(answer.visual_tokens)
        assert said <= left
        assert (answer.reason == "eos") or (answer.reason == "context" and said == left)
        assert_same(answer, reference_generate(model, processor, prompt, DecodingOptions(max_new_tokens=500)))


def test_what_may_not_be_said_is_not_said(parts, prompts):
    model, processor = parts
    vocabulary = vocabulary_of(model, processor)
    hot = DecodingOptions(max_new_tokens=24, temperature=100.0)  # nearly uniform: every id that is possible is likely to be tried
    for answer in generate(model, processor, prompts * 2, hot, seeds=list(range(10))):
        ids = answer.token_ids
        assert vocabulary.image_token_id not in ids
        assert max(ids) < len(processor.tokenizer)
        starts = [i for i, token_id in enumerate(ids) if token_id == vocabulary.image_start_id]
        ends = [i for i, token_id in enumerate(ids) if token_id == vocabulary.image_end_id]
        assert ends == [start + 1 for start in starts]


def test_options_restrict_images(parts, prompts):
    several = [GREEDY.updated(allow_images=False), GREEDY.updated(max_images=0), SAMPLED.updated(max_images=2), SAMPLED]
    several.append(SAMPLED.updated(begin_with_image=True, max_new_tokens=K + 2))
    none, zero, two, free, begun = generate(*parts, prompts, [option.updated(temperature=0.0) for option in several])
    assert not none.visual_tokens + zero.visual_tokens
    assert len(two.visual_tokens) == 2 < len(free.visual_tokens)
    assert isinstance(begun.events[0], ImageStart)
    assert len(begun.visual_tokens) == 1


def test_every_end_token_of_the_generation_settings_stops(parts, prompts):
    model, processor = parts
    spoken = generate(model, processor, prompts[:1], GREEDY)[0]
    special = set(processor.tokenizer.all_special_ids)
    last_text = next(token_id for token_id in spoken.token_ids[::-1] if token_id not in special)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, last_text]
        answer = generate(model, processor, prompts[:1], GREEDY)[0]
    finally:
        model.generation_config.eos_token_id = before
    assert answer.reason == "eos"
    assert answer.token_ids == spoken.token_ids[: spoken.token_ids.index(last_text) + 1]


def test_events_tell_the_answer_in_order(parts, prompts, sampled):
    told = [[] for _ in prompts]
    for number, event in stream(*parts, prompts, SAMPLED, seeds=SEEDS):
        told[number].append(event)
    for answer, events in zip(sampled, told, strict=True):
        assert [type(event) for event in events] == [type(event) for event in answer.events]
        assert isinstance(events[-1], End)
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answer.text
        for place, event in enumerate(events):
            if isinstance(event, ImageStart):
                image = events[place : place + K + 2]
                assert [type(e) for e in image] == [ImageStart, *[VisualToken] * K, ImageEnd]
                torch.testing.assert_close(torch.stack([e.token for e in image[1:-1]]), image[-1].visual_tokens)
                torch.testing.assert_close(image[-1].visual_tokens.norm(dim=-1), torch.ones(K))


def test_a_model_in_training_mode_is_answered_for_and_left_as_it_was(parts, prompts):
    model, processor = parts
    expected = generate(model, processor, prompts[:2], GREEDY)
    model.activation_checkpointing_enable()
    model.train()
    try:
        answers = generate(model, processor, prompts[:2], GREEDY)
        assert model.training
        with pytest.raises(ContextLengthError):  # also after an error
            generate(model, processor, [processor.encode([Message.user("x" * 300)], max_length=1000)])
        assert model.training
    finally:
        model.activation_checkpointing_disable()
        model.eval()
    for answer, other in zip(answers, expected, strict=True):
        assert_same(answer, other)


def test_left_padding_keeps_images_and_positions_aligned(prompts):
    batch = left_pad(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(batch.input_ids[row, -len(prompt) :], prompt.input_ids)
        assert batch.position_ids[row, -1] == len(prompt) - 1
        assert int(batch.attention_mask[row].sum()) == len(prompt)
    assert len(batch.from_pixels) == sum(prompt.num_images for prompt in prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 but at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"begin_with_image": True, "allow_images": False}, "begin_with_image"),
        ({"temprature": 1.0}, "Did you mean temperature"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GREEDY.updated(**changes)


def test_prompts_that_do_not_fit_are_refused_with_counts(parts, prompts):
    model, processor = parts
    context = model.config.text_config.max_position_embeddings
    long = processor.encode([Message.user(*[picture("red")] * 45)], add_generation_prompt=True, max_length=1000, id="album")
    with pytest.raises(ContextLengthError, match=rf"45 images x 6 positions .* fewer than {context} .*album.*at most 42 images"):
        generate(model, processor, [long])
    with pytest.raises(ContextLengthError, match="3 positions left but an image needs 6"):
        generate(model, processor, prompts[:1], DecodingOptions(max_new_tokens=3, begin_with_image=True))
    with pytest.raises(ConfigError, match="2 seeds but 5 prompts"):
        generate(model, processor, prompts, seeds=[1, 2])


VOCABULARY = Vocabulary(
    image_token_id=7,
    image_start_id=8,
    image_end_id=9,
    stop_ids=frozenset({6}),
    special_ids=(6, 7, 8, 9),
    size=10,
    num_visual_tokens=4,
    context=99,
)


def slots(options: DecodingOptions, count: int = 1, **fields) -> list[Slot]:
    return [Slot(key=i, options=options, seed=i, num_prompt=3, **fields) for i in range(count)]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 0.0, 1.0, 50.0, 0.0, 50.0]).expand(4000, -1)
    options = DecodingOptions(temperature=2.0, allow_images=False)
    counts = torch.bincount(torch.tensor(choose_tokens(logits, slots(options, 4000), VOCABULARY)), minlength=10) / 4000
    expected = torch.cat([(logits[0, :7] / 2).softmax(0), torch.zeros(3)])  # placeholder, start and end are banned here
    assert (counts - expected).abs().max() < 0.03
    kept = choose_tokens(logits, slots(options.updated(top_k=2), 4000), VOCABULARY)
    assert set(kept) <= {0, 2, 6}
    nucleus = choose_tokens(logits, slots(options.updated(top_p=0.2), 500), VOCABULARY)
    assert set(nucleus) == {2}


def test_repetition_penalty_spares_special_tokens():
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0, 0.0, 0.0, 1.95, 0.0, 0.0, 0.0]])
    options = DecodingOptions(repetition_penalty=2.0)
    assert choose_tokens(logits, slots(options), VOCABULARY) == [0]
    assert choose_tokens(logits, slots(options, text_ids=(0, 6, 6)), VOCABULARY) == [6]
    ragged = [slots(options)[0], slots(options, text_ids=(0, 6))[0], slots(options, text_ids=(0,))[0]]
    assert choose_tokens(logits.expand(3, -1), ragged, VOCABULARY) == [0, 6, 6]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_deltas_never_break_a_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.push(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    assert detokenizer.flush() == ""


def test_half_a_character_is_shown_as_broken_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    butterfly = tokenizer.encode("a🦋", add_special_tokens=False)
    assert [detokenizer.push(token_id) for token_id in butterfly[:-1]] == ["a", "", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(tokenizer.eos_token_id) == ""
    assert "".join(detokenizer.push(token_id) for token_id in butterfly) == "a🦋"


def test_a_cache_that_was_changed_from_outside_goes_on_from_what_it_holds_now(parts, prompts):
    """The room behind the columns is used only by whoever still stands at its end."""
    model, processor = parts
    state = prefill(model, [prompts[0], prompts[0]], vocabulary_of(model, processor), GREEDY)
    state, _ = step(model, state)
    layer = state.cache.layers[0]
    layer.reorder_cache(torch.tensor([1, 0]))
    new = torch.full((*layer.keys.shape[:2], 1, layer.keys.shape[-1]), 7.0)
    before = layer.keys.clone()
    keys, _ = layer.update(new, new)
    assert torch.equal(keys, torch.cat([before, new], dim=2))
    with torch.inference_mode():
        layer.update(new, new)
    layer.update(new, new)
    assert layer.get_seq_length() == before.shape[2] + 3


def test_at_least_one_row_is_needed(parts, prompts):
    with pytest.raises(ConfigError, match="max_rows=0 but at least 1"):
        generate(*parts, prompts, max_rows=0)
