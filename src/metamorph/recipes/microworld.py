"""The same path at the size of a laptop: the microworld's parts are shipped with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import metamorph.microworld
from metamorph.microworld.diffusion import DECODER_CONDITIONER, DECODER_OBJECTIVE
from metamorph.training.config import DataConfig, DecoderConfig, ModelConfig, RunConfig, SourceConfig, StageConfig, TrainingConfig
from metamorph.training.stages import paper_stages

WEIGHTS = Path(metamorph.microworld.__path__[0]) / "weights"
NUM_VISUAL_TOKENS = 16
# In a few minutes not all six kinds can be learnt: answering and drawing come first.
DEMO_MIXTURE = {"image_qa": 0.44, "generation": 0.46, "video_qa": 0.01, "frames": 0.02, "thinking": 0.02, "edit": 0.03, "text": 0.02}
PROJECTOR_TRAINING = TrainingConfig(batch_size=16, optimizer="muon", learning_rate=1e-2, warmup_ratio=0.05, weight_decay=0.01)


def microworld_demo() -> RunConfig:
    """Both VPiT stages in a few minutes on two cores: what `make demo` trains."""
    return _vpit(
        "demo",
        "A small LLM learns to see and to draw, in a few minutes on two cores.",
        projector=PROJECTOR_TRAINING.model_copy(update={"steps": 100}),
        joint=TrainingConfig(
            steps=1_130, batch_size=16, optimizer="muon", learning_rate=3e-3, warmup_ratio=0.05, weight_decay=0.01, checkpoint_every=250
        ),
        kinds=DEMO_MIXTURE,
    )


def microworld() -> RunConfig:
    """The shipped model: the demo's recipe, trained longer on the whole mixture."""
    return _vpit(
        "microworld",
        "The shipped microworld model: the demo's recipe, trained longer on all kinds of data.",
        projector=PROJECTOR_TRAINING.model_copy(update={"steps": 400}),
        joint=TrainingConfig(
            steps=6_000,
            batch_size=16,
            optimizer="muon",
            learning_rate=2.5e-3,
            warmup_ratio=0.03,
            weight_decay=0.01,
            checkpoint_every=300,
            log_every=25,
        ),
    )


def microworld_decoder() -> RunConfig:
    """The microworld's decoder, from its text-conditioned base as `metamorph microworld build` leaves it."""
    return RunConfig(
        name="microworld-decoder",
        description="Visual tokens to 64 x 64 pictures: a sketch, completed by diffusion.",
        decoder=DecoderConfig(
            encoder=str(WEIGHTS / "metamorph"),
            base="runs/microworld/parts/base",
            batches=SourceConfig(source="metamorph.microworld.diffusion.decoder_batches"),
            conditioner=DECODER_CONDITIONER,
            objective=DECODER_OBJECTIVE,
            ema_decay=0.998,
        ),
        stages=(
            StageConfig(
                name="decoder",
                training=TrainingConfig(
                    steps=2_600, batch_size=32, learning_rate=1e-3, warmup_ratio=0.05, min_learning_rate_ratio=0.05, weight_decay=0.01,
                    precision="float32", checkpoint_every=200, log_every=25,
                ),
            ),
        ),
    )  # fmt: skip


def _vpit(
    name: str, description: str, *, projector: TrainingConfig, joint: TrainingConfig, kinds: Mapping[str, float] | None = None
) -> RunConfig:
    first, second = paper_stages(projector, joint.model_copy(update={"drawn_token_dropout": 1.0}))
    return RunConfig(
        name=name,
        description=description,
        model=ModelConfig(
            llm=str(WEIGHTS / "llm"),
            vision=str(WEIGHTS / "encoder"),
            overrides={"num_visual_tokens": NUM_VISUAL_TOKENS},
        ),
        data=_data(kinds),
        # A frozen LLM cannot learn to say that it draws: rows with drawings would only pull the projector about.
        stages=(first.model_copy(update={"data": _data({"image_qa": 1.0})}), second),
    )


def _data(kinds: Mapping[str, float] | None) -> DataConfig:
    source = {"size": 1_000_000, "seed": 0, **({} if kinds is None else {"kinds": dict(kinds)})}
    sources = (SourceConfig(source="metamorph.microworld.examples.training_source", kwargs=source),)
    return DataConfig(sources=sources, order="infinite", max_length=512, pack=True)
