"""The same path at the size of a laptop: the microworld's parts are shipped with the package."""

from __future__ import annotations

from pathlib import Path

import metamorph.microworld
from metamorph.microworld.diffusion import DECODER_CONDITIONER, DECODER_OBJECTIVE
from metamorph.training.config import DataConfig, DecoderConfig, ModelConfig, RunConfig, SourceConfig, StageConfig, TrainingConfig
from metamorph.training.stages import paper_stages

WEIGHTS = Path(metamorph.microworld.__path__[0]) / "weights"
NUM_VISUAL_TOKENS = 16


def microworld_demo() -> RunConfig:
    """Both VPiT stages in a few minutes on two cores: what `make demo` trains."""
    return _vpit(
        "demo",
        "A small LLM learns to see and to draw, in a few minutes on two cores.",
        projector=TrainingConfig(steps=60, batch_size=32, learning_rate=2e-3, warmup_ratio=0.1, weight_decay=0.01),
        joint=TrainingConfig(steps=700, batch_size=32, learning_rate=1e-3, warmup_ratio=0.05, weight_decay=0.01, checkpoint_every=200),
    )


def microworld() -> RunConfig:
    """The shipped model: the demo's recipe, trained longer."""
    return _vpit(
        "microworld",
        "The shipped microworld model: the demo's recipe, trained longer.",
        projector=TrainingConfig(steps=150, batch_size=32, learning_rate=2e-3, warmup_ratio=0.1, weight_decay=0.01),
        joint=TrainingConfig(
            steps=4_800, batch_size=32, learning_rate=1e-3, warmup_ratio=0.03, weight_decay=0.01, checkpoint_every=500, log_every=25
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


def _vpit(name: str, description: str, *, projector: TrainingConfig, joint: TrainingConfig) -> RunConfig:
    return RunConfig(
        name=name,
        description=description,
        model=ModelConfig(llm=str(WEIGHTS / "llm"), vision=str(WEIGHTS / "encoder"), overrides={"num_visual_tokens": NUM_VISUAL_TOKENS}),
        data=DataConfig(
            sources=(SourceConfig(source="metamorph.microworld.examples.training_source", kwargs={"size": 1_000_000, "seed": 0}),),
            max_length=512,
            pack=True,
        ),
        stages=paper_stages(projector, joint),
    )
