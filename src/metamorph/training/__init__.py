"""Training: how weights change."""

from metamorph.training.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from metamorph.training.loop import TrainResult, train

__all__ = [
    "DataConfig",
    "DecoderConfig",
    "ModelConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "TrainResult",
    "TrainingConfig",
    "train",
]
