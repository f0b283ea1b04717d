"""The microworld's pretrained parts, from nothing: tokenizer and language model, encoder, diffusion base, decoder.

Each part is trained by the project's own loop, checked against its gate, saved in float16 with a card, and
skipped when it is already there; a part that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metamorph.errors import ComponentError
from metamorph.microworld.cards import CARD, Card, write_card
from metamorph.microworld.language import (
    ROW_LENGTH,
    LanguageSize,
    answers_in_text,
    build_llama,
    language_batch,
    language_step,
    lesson_at,
    name_questions,
    text_perplexity,
    told_scene_questions,
)
from metamorph.microworld.names import named_looks
from metamorph.microworld.probes import GATED, run_probes
from metamorph.microworld.token_labels import TokenReader
from metamorph.microworld.tokenizer import build_tokenizer
from metamorph.microworld.vision import NUM_VISUAL_TOKENS, DenseCaptioner, EncoderTraining, build_siglip, encoder_batch, encoder_step
from metamorph.training.config import TrainingConfig
from metamorph.training.loop import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SiglipModel

    from metamorph.model.vision_encoder import VisionEncoder

WEIGHTS = Path(__file__).parent / "weights"
PARTS = ("llm", "encoder", "base", "decoder")
NAMES_GATE, TOLD_GATE, PROBE_GATE = 0.95, 0.77, 0.97

LANGUAGE_TRAINING = TrainingConfig(
    steps=3200, batch_size=16, optimizer="muon", learning_rate=4e-3, learning_rate_scale={"model.embed_tokens": 0.5}, warmup_ratio=0.02,
    min_learning_rate_ratio=0.02, weight_decay=0.05, betas=(0.9, 0.98), precision="float32", checkpoint_every=200, log_every=25,
)  # fmt: skip
ENCODER_TRAINING = TrainingConfig(
    steps=2600, batch_size=64, learning_rate=1.5e-3, warmup_ratio=0.083, min_learning_rate_ratio=0.02, weight_decay=0.02,
    betas=(0.9, 0.98), loss_weights={"contrastive": 0.1}, precision="float32", checkpoint_every=200, log_every=25,
)  # fmt: skip
BASE_TRAINING = TrainingConfig(
    steps=450, batch_size=32, learning_rate=1e-3, warmup_ratio=0.05, min_learning_rate_ratio=0.05, weight_decay=0.01,
    precision="float32", checkpoint_every=200, log_every=25,
)  # fmt: skip
SKETCH_TRAINING = BASE_TRAINING.model_copy(update={"steps": 3000, "learning_rate": 2e-3, "warmup_ratio": 0.02, "log_every": 50})
DECODER_TRAINING = BASE_TRAINING.model_copy(update={"steps": 1200})


def shipped(name: str) -> Path:
    """Directory of a part that comes with the package: "llm", "encoder", "decoder" or "metamorph".

    Raises:
        ComponentError: there is no such part.
    """
    directory = WEIGHTS / name
    if not (directory / CARD).is_file():
        known = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CARD}"))
        raise ComponentError(
            f"{name!r} but the package holds {', '.join(known) or 'no parts'} ({WEIGHTS}). Name one of those, or build it."
        )
    return directory


class NumberedStream:
    """Batches that are pure functions of their number, so that an interrupted part goes on exactly."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make, self.step = make, 0

    def __next__(self) -> list[Any]:
        """The one micro-batch of the next step."""
        self.step += 1
        return [self.make(self.step - 1)]

    def state_dict(self) -> dict[str, int]:
        """Number of batches taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many batches."""
        self.step = state["step"]


@dataclass(frozen=True)
class Build:
    """One run of the build: where the parts go, where the training runs lie, how large the language model is, how long all of it takes.

    `scale` multiplies the steps of every part (1.0 is what ships; tests use a tiny one and skip the gates).
    """

    out: Path
    work: Path
    size: LanguageSize = "small"
    scale: float = 1.0
    seed: int = 0
    gates: bool = True

    def training(self, config: TrainingConfig) -> TrainingConfig:
        """The settings with scaled steps and this build's seed."""
        return config.model_copy(update={"steps": max(2, round(config.steps * self.scale)), "seed": self.seed})

    def run(self, part: str, step: Any, model: torch.nn.Module, make: Callable[[int], Any], config: TrainingConfig, **kwargs: Any) -> None:
        """Train one part, or go on training it."""
        train(step, model, NumberedStream(make), self.training(config), self.work / part, stage=part, resume=True, **kwargs)


def build(settings: Build, parts: tuple[str, ...] = PARTS) -> None:
    """Build the parts that are not there yet, in order.

    Raises:
        ComponentError: a part misses its gate.
    """
    makers = {"llm": _build_language_model, "encoder": _build_encoder, "base": _build_base, "decoder": _build_decoder}
    for part in PARTS:
        if part in parts and not (settings.out / part / CARD).is_file():
            makers[part](settings)


def check_gate(part: str, scores: dict[str, float], floors: dict[str, float]) -> None:
    """Refuse a part whose scores are below their floors.

    Raises:
        ComponentError: naming each figure and its floor.
    """
    missed = [f"{name} {scores[name]:.3f} but at least {floor} is needed" for name, floor in floors.items() if scores[name] < floor]
    if missed:
        raise ComponentError(f"{'; '.join(missed)} (microworld {part}). Train longer: metamorph microworld build --scale 1.5.")


def _save(settings: Build, part: str, what: str, config: TrainingConfig, scores: dict[str, float]) -> None:
    how = {**settings.training(config).to_dict(), "size": settings.size, "command": "metamorph microworld build"}
    write_card(settings.out / part, Card(part, what, how, scores))


# ---- language model -----------------------------------------------------------------------------------------


def _build_language_model(settings: Build) -> None:
    tokenizer = build_tokenizer(settings.seed)
    torch.manual_seed(settings.seed)
    model = build_llama(settings.size, tokenizer)
    config = LANGUAGE_TRAINING
    steps = settings.training(config).steps

    def make(step: int) -> Any:
        rng = np.random.default_rng([1, settings.seed, step])
        return language_batch(tokenizer, config.batch_size, ROW_LENGTH, rng, lesson_at(step / steps))

    settings.run("llm", language_step, model, make, config)
    scores = score_language_model(model, tokenizer)
    if settings.gates:
        check_gate("llm", scores, {"names_in_text": NAMES_GATE, "told_scenes": TOLD_GATE})
    tokenizer.save_pretrained(settings.out / "llm")
    model.half().save_pretrained(settings.out / "llm")
    _save(settings, "llm", f"Llama ({settings.size}) pretrained on the microworld's text", config, scores)


def score_language_model(
    model: Any, tokenizer: PreTrainedTokenizerFast, each: int = 4, seed: int = 5, scenes: int = 450
) -> dict[str, float]:
    """Share of right answers about names and about scenes told in words, all in text, and perplexity on fresh documents."""
    model.eval()
    questions = {"names_in_text": name_questions(named_looks(), seed, each), "told_scenes": told_scene_questions(scenes, seed)}
    scores: dict[str, float] = {}
    for name, asked in questions.items():
        answers = answers_in_text(model, tokenizer, [question for question, _ in asked])
        scores[name] = float(np.mean([said.strip() == answer for said, (_, answer) in zip(answers, asked, strict=True)]))
    return {**scores, "perplexity": text_perplexity(model, tokenizer, seed)}


# ---- encoder ------------------------------------------------------------------------------------------------


def microworld_vision(siglip: SiglipModel) -> VisionEncoder:
    """The definition of the microworld's visual tokens over a SigLIP model: 16 tokens, all else as in the paper."""
    from transformers import LlamaConfig

    from metamorph.model.configuration import MetaMorphConfig
    from metamorph.model.vision_encoder import VisionEncoder

    config = MetaMorphConfig(text_config=LlamaConfig(), vision_config=siglip.config.vision_config, num_visual_tokens=NUM_VISUAL_TOKENS)
    vision = VisionEncoder(config)
    vision.encoder = siglip.vision_model
    return vision


def _build_encoder(settings: Build) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.out / "llm")
    torch.manual_seed(settings.seed + 1)
    siglip = build_siglip(len(tokenizer), tokenizer.pad_token_id)
    side = siglip.config.vision_config.image_size // siglip.config.vision_config.patch_size
    vision = microworld_vision(siglip)
    siglip.requires_grad_(True)  # a VisionEncoder freezes its encoder; here it is what is trained
    heads = DenseCaptioner(len(tokenizer)), TokenReader(siglip.config.vision_config.hidden_size)
    model = EncoderTraining(siglip, lambda states: vision.pool(states.unflatten(1, (side, side))), *heads)

    def make(step: int) -> Any:
        return encoder_batch(tokenizer, ENCODER_TRAINING.batch_size, np.random.default_rng([2, settings.seed, step]))

    settings.run("encoder", encoder_step, model, make, ENCODER_TRAINING)
    scores = dict(run_probes(vision))
    if settings.gates:
        check_gate("encoder", scores, dict.fromkeys(GATED, PROBE_GATE))
    save_encoder(siglip, tokenizer, settings.out / "encoder")
    _save(settings, "encoder", "SigLIP-class encoder with a text tower", ENCODER_TRAINING, scores)


def save_encoder(siglip: SiglipModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save both towers in float16, the tokenizer, and how pictures are preprocessed."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    siglip.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = siglip.config.vision_config.image_size
    SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)


def load_encoder(directory: Path) -> tuple[SiglipModel, PreTrainedTokenizerFast]:
    """Both towers in float32, frozen, and the tokenizer."""
    from transformers import AutoTokenizer, SiglipModel

    siglip = SiglipModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    return siglip.eval().requires_grad_(False), AutoTokenizer.from_pretrained(directory)


# ---- diffusion base and decoder -----------------------------------------------------------------------------


def _build_base(settings: Build) -> None:
    from metamorph.decoder import VisualDecoderPipeline, WeightAverage, decoder_step
    from metamorph.microworld.diffusion import base_batches, new_base

    siglip, tokenizer = load_encoder(settings.out / "encoder")
    torch.manual_seed(settings.seed + 2)
    model = new_base()
    average = WeightAverage(model, decay=0.995)
    make = base_batches(siglip, tokenizer, BASE_TRAINING.batch_size, settings.seed)
    settings.run("base", decoder_step, model, make, BASE_TRAINING, companions={"average": average})
    average.copy_to(model)
    VisualDecoderPipeline.from_model(model).save_pretrained(settings.out / "base", dtype=torch.float16)
    _save(settings, "base", "text-conditioned diffusion base: this world's Stable Diffusion", BASE_TRAINING, {})


def _build_decoder(settings: Build) -> None:
    from metamorph.decoder import VisualDecoderPipeline, WeightAverage, decoder_step, sketch_step
    from metamorph.microworld.diffusion import decoder_batches, decoder_from_base

    siglip, _ = load_encoder(settings.out / "encoder")
    vision = microworld_vision(siglip)
    torch.manual_seed(settings.seed + 3)
    model = decoder_from_base(settings.out / "base")
    # The sketch is learnt from true tokens: with errors from the start, reconstruction ended at 0.82 (LAB_LOG.md).
    make = decoder_batches(vision, DECODER_TRAINING.batch_size, settings.seed)
    settings.run("sketch", sketch_step, model, make, SKETCH_TRAINING)
    average = WeightAverage(model, decay=0.998)
    # Other pictures than the sketch saw.
    make = decoder_batches(vision, DECODER_TRAINING.batch_size, settings.seed + 1, regression_errors=True)
    settings.run("decoder", decoder_step, model, make, DECODER_TRAINING, companions={"average": average})
    average.copy_to(model)
    pipeline = VisualDecoderPipeline.from_model(model)
    scores = score_decoder(pipeline, vision)
    pipeline.save_pretrained(settings.out / "decoder", dtype=torch.float16)
    _save(settings, "decoder", "visual tokens to pixels, finetuned from the base", DECODER_TRAINING, scores)


@torch.no_grad()
def score_decoder(pipeline: Any, encode: Callable[[Tensor], Tensor], count: int = 200, seed: int = 9) -> dict[str, float]:
    """Share of held-out pictures that the judge reads back exactly after encoding and decoding."""
    from metamorph.microworld.reader import read_many
    from metamorph.microworld.scenes import render
    from metamorph.microworld.vision import to_pixels
    from metamorph.microworld.world import SceneRules, sample_scene

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, SceneRules("test", use="any")) for _ in range(count)]
    tokens = encode(to_pixels([render(scene) for scene in scenes]))
    pictures = pipeline(tokens, seeds=list(range(count)), output_type="pil")
    readings = read_many(pictures)
    exact = [r.scene is not None and r.scene.attributes == s.attributes for r, s in zip(readings, scenes, strict=True)]
    return {"reconstruction_exact": float(np.mean(exact))}
