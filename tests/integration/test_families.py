"""Any LLM with any encoder: every pair is joined, trained through the project's own loop, answers, and survives being saved."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tests.families import IMAGE, LLMS, VISION_WIDTH, VISIONS, WINDOW, K, llm_directory, vision_directory
from tests.reference import reference_generate
from tests.tiny import make_eager_to_draw

from metamorph.data.collate import pack, pad
from metamorph.errors import ConfigError
from metamorph.messages import ImagePart, Message
from metamorph.model import initialize, load
from metamorph.model.generation import generate, vocabulary_of
from metamorph.model.state import DecodingOptions
from metamorph.training import TrainingConfig, train
from metamorph.training.stages import select_trainable
from metamorph.training.trackers import SilentTracker

ENCODERS = ["siglip", "siglip2", "clip", "dinov2"]
OPTIONS = DecodingOptions(max_new_tokens=K + 6, begin_with_image=True)


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (IMAGE + 8, IMAGE), colour)


DRAWN = torch.nn.functional.normalize(torch.randn(K, VISION_WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)
TALK = [
    Message.user(picture("red"), "What is this? Draw it, please!"),
    Message.assistant("A red star:", picture("green"), "Anything else?"),
    Message.user("And now", picture("blue")),
    Message.assistant(picture("red"), "That one is blue."),
]


class Built:
    """Directories on disk and the models joined from them, made once each."""

    def __init__(self, root):
        self.root, self.directories, self.models = root, {}, {}

    def llm(self, name):
        return self._directory(name, llm_directory)

    def vision(self, name):
        return self._directory(name, vision_directory)

    def _directory(self, name, make):
        if name not in self.directories:
            self.directories[name] = make(name, self.root)
        return self.directories[name]

    def join(self, llm, vision):
        return initialize(self.llm(llm), self.vision(vision), num_visual_tokens=K)

    def model(self, llm):
        """One to read from, not to train; it draws often."""
        if llm not in self.models:
            model, processor = self.join(llm, "siglip")
            make_eager_to_draw(model)
            self.models[llm] = model, processor
        return self.models[llm]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("families"))


@pytest.fixture(params=LLMS)
def family(request, built):
    return request.param, *built.model(request.param)


class TwoSteps:
    """A stream of the same batch."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return [self.batch]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def prompts(processor):
    conversations = [
        [Message.user("hi")],
        [Message.user(picture("red"), "What is this?")],
        [Message.user("Draw."), Message.assistant("Here:", ImagePart(visual_tokens=DRAWN)), Message.user("And", picture("red"), "?")],
    ]
    return [processor.encode(messages, add_generation_prompt=True) for messages in conversations]


def same(answer, other) -> bool:
    others = getattr(other, "images", None)
    others = other.visual_tokens if others is None else others
    assert len(answer.visual_tokens) == len(others)
    for ours, theirs in zip(answer.visual_tokens, others, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    return list(answer.token_ids) == list(other.token_ids) and answer.reason == other.reason


@pytest.mark.parametrize("vision", ENCODERS)
@pytest.mark.parametrize("llm", LLMS)
def test_a_pair_is_joined_trained_asked_and_saved(built, tmp_path, llm, vision):
    model, processor = built.join(llm, vision)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = pad([processor.encode(TALK, id="talk"), processor.encode(TALK[:2], id="first")])
    assert batch.target_counts["visual"] == 3 * K and batch.target_counts["text"] > 10
    select_trainable(model, None, ["vision_encoder"])
    settings = TrainingConfig(steps=2, learning_rate=1e-2, precision="float32", log_every=1, device="cpu")
    result = train(
        lambda model, batch: model.loss_terms(batch), model, TwoSteps(batch), settings, tmp_path / "run", tracker=SilentTracker()
    )
    first, second = ([row[key] for row in result.history if key in row] for key in ("text_loss", "visual_loss"))
    assert first[1] < first[0] and second[1] < second[0]
    after = model.state_dict()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still == {name for name in before if name.startswith("vision_encoder.")}
    model.eval()
    asked = prompts(processor)
    answers = generate(model, processor, asked, OPTIONS)
    assert all(answer.visual_tokens for answer in answers)
    assert same(answers[0], generate(model, processor, asked[:1], OPTIONS)[0])  # the shortest: left-padded in the batch
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, its_processor = load(tmp_path / "model")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    tied = LLMS[llm].settings.get("tie_word_embeddings", False)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    assert same(answers[2], generate(loaded, its_processor, prompts(its_processor)[2:], OPTIONS)[0])


def test_logits_are_those_of_the_llm_alone(family, built):
    from transformers import AutoModelForCausalLM

    name, _, _ = family
    model, processor = built.join(name, "siglip")
    ids = processor.encode([Message.user("What is this?")], add_generation_prompt=True).input_ids[None]
    alone = AutoModelForCausalLM.from_pretrained(built.llm(name)).eval()
    known = len(processor.tokenizer) - 3
    with torch.no_grad():
        expected = alone(ids).logits[..., :known]
        found = model(ids).logits[..., :known]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.01


def test_new_rows_are_the_mean_of_the_old_ones(family, built):
    from transformers import AutoModelForCausalLM

    name, _, _ = family
    model, processor = built.join(name, "siglip")
    alone, known = AutoModelForCausalLM.from_pretrained(built.llm(name)), len(processor.tokenizer) - 3
    ids = [processor.image_token_id, processor.image_start_id, processor.image_end_id]
    for ours, theirs in (
        (model.get_input_embeddings(), alone.get_input_embeddings()),
        (model.get_output_embeddings(), alone.get_output_embeddings()),
    ):
        assert torch.equal(ours.weight[:known], theirs.weight[:known])
        torch.testing.assert_close(ours.weight[ids], theirs.weight[:known].mean(dim=0).expand(3, -1), atol=1e-6, rtol=0)


def test_words_and_visual_tokens_reach_the_first_layer_as_they_should(family):
    name, model, processor = family
    sequence = processor.encode([Message.user(picture("red"), "What is this?")], add_generation_prompt=True)
    read = []
    first = model.get_decoder().layers[0]
    hook = first.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args or (kwargs["hidden_states"],))[0][0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**pad([sequence]).model_inputs())
            model.language_model(sequence.input_ids[None])
            tokens = model.encode_images(sequence.pixel_values)
            prompt = generate(model, processor, [sequence], DecodingOptions(max_new_tokens=K + 2, begin_with_image=True))
    finally:
        hook.remove()
    ours, words, *steps = read
    torch.testing.assert_close(ours[~sequence.is_visual], words[~sequence.is_visual], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[sequence.is_visual], model.projector(tokens)[0], atol=1e-5, rtol=1e-5)
    drawn = torch.stack([row[-1] for row in steps])[2 : K + 2]  # after the prompt and <image_start>
    torch.testing.assert_close(drawn, model.projector(prompt[0].visual_tokens[0]), atol=1e-4, rtol=1e-4)
    factor = {"gemma": 32**0.5, "gemma2": 32**0.5, "gemma3": 32**0.5, "granite": 12.0}.get(name, 1.0)
    rows = model.get_input_embeddings().weight[sequence.input_ids]
    torch.testing.assert_close(words, rows * factor, atol=1e-5, rtol=1e-3)


def test_batches_padded_on_either_side_and_packs_are_one_by_one(family):
    name, model, processor = family
    sequences = [processor.encode(TALK, id="long"), processor.encode(TALK[:2], id="short")]
    assert min(map(len, sequences)) > WINDOW
    with torch.no_grad():
        alone = [model.loss_terms(pad([sequence])) for sequence in sequences]
        for side in ("left", "right"):
            together = model.loss_terms(pad(sequences, side=side))
            for kind, term in together.items():
                torch.testing.assert_close(term.sum, sum(terms[kind].sum for terms in alone), atol=1e-3, rtol=1e-5)
                assert int(term.count) == sum(int(terms[kind].count) for terms in alone)
        packed = pack(sequences, max_length=sum(map(len, sequences)))
        assert len(packed) == 1
        if name == "gemma2":
            with pytest.raises(ConfigError, match="attention 'eager' but packed rows need"):
                model.loss_terms(packed)
            return
        for kind, term in model.loss_terms(packed).items():
            torch.testing.assert_close(term.sum, sum(terms[kind].sum for terms in alone), atol=1e-3, rtol=1e-5)


def test_cached_answers_beyond_the_sliding_window_are_those_of_the_slow_twin(family):
    _, model, processor = family
    asked = prompts(processor)
    options = DecodingOptions(max_new_tokens=WINDOW + 8, temperature=1.0)
    answers = generate(model, processor, asked, options, seeds=[1, 2, 3])
    for seed, (answer, prompt) in enumerate(zip(answers, asked, strict=True), start=1):
        assert same(answer, reference_generate(model, processor, prompt, options, seed))
    assert sum(len(answer.token_ids) + K * len(answer.visual_tokens) for answer in answers) > WINDOW


def test_a_window_of_the_families_that_have_one_matters(built):
    """Otherwise the tests above would pass without windows."""
    for name in ("mistral", "gemma3", "gemma2"):
        model, processor = built.model(name)
        assert model.language_model.config.sliding_window == WINDOW
        ids = processor.encode(TALK, id="talk").input_ids.masked_fill(processor.encode(TALK).is_visual, 5)[None]
        changed = ids.clone()
        changed[0, 1] = 7
        reach = (model.get_decoder()(ids).last_hidden_state - model.get_decoder()(changed).last_hidden_state).abs().amax(dim=-1)[0]
        layers = getattr(model.language_model.config, "layer_types", None) or ["sliding_attention"] * 2
        assert bool((reach[2 * WINDOW + 2 :] == 0).all()) is ("full_attention" not in layers)


def test_an_answer_ends_with_the_turn(family):
    name, model, processor = family
    end = processor.tokenizer.convert_tokens_to_ids(LLMS[name].end_of_turn)
    assert end in vocabulary_of(model, processor).stop_ids
    head = model.get_output_embeddings()
    prompt = processor.encode([Message.user("hi")], add_generation_prompt=True)
    hook = head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([end]), 1e4))
    try:
        answer = generate(model, processor, [prompt], DecodingOptions(max_new_tokens=9))[0]
    finally:
        hook.remove()
    assert (answer.reason, answer.token_ids, answer.text) == ("eos", (end,), "")


def test_encoders_with_registers_and_in_checkpoints_of_two_towers_join_too(built, tmp_path):
    model, processor = built.join("llama", "dinov2_registers")
    assert model.loss_terms(pad([processor.encode(TALK)]))["visual"].count == 2 * K
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    for name in (name for name, vision in VISIONS.items() if vision.two_towers):
        both = vision_directory(name, tmp_path, two_towers=True)
        joined, its_processor = initialize(built.llm("llama"), both, num_visual_tokens=K)
        assert its_processor.image_size == (IMAGE, IMAGE)
        assert joined.encode_images(pixels).shape == (2, K, VISION_WIDTH)
