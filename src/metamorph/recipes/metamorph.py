"""The paper's models: only numbers that are known from it, its README or its code (docs/paper.md); nothing invented."""

from __future__ import annotations

import math

from metamorph.training.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.stages import paper_stages

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
SIGLIP = "google/siglip-so400m-patch14-384"


def paper_learning_rate(batch_size: int) -> float:
    """4e-5 x sqrt(batch / 512), which every rate in the paper and its README follows (section 4)."""
    return 4e-5 * math.sqrt(batch_size / 512)


def metamorph_llama3_1_8b() -> RunConfig:
    """LLaMA-3.1 8B + SigLIP SO400M: the paper's final model. Its data must be given for each stage, in any format."""

    def training(batch_size: int) -> TrainingConfig:
        return TrainingConfig(
            batch_size=batch_size,
            micro_batch_size=1,  # ours, as is the interval of checkpoints: neither changes the result
            learning_rate=paper_learning_rate(batch_size),
            schedule="cosine",
            warmup_ratio=0.03,
            weight_decay=0.0,
            visual_loss_weight=1.0,
            precision="bfloat16",
            gradient_checkpointing=True,
            checkpoint_every=500,
        )

    def one_epoch(path: str) -> DataConfig:
        source = SourceConfig(source="metamorph.data.source.open_source", kwargs={"path": path})
        return DataConfig(sources=(source,), order="epoch", max_length=4096)

    projector, vpit = paper_stages(training(768), training(1536))
    return RunConfig(
        name="metamorph-llama3.1-8b",
        description="The paper's final model: VPiT on six kinds of data, one epoch per stage.",
        model=ModelConfig(llm=LLAMA, vision=SIGLIP),  # 64 visual tokens, bilinear pooling, mlp heads, cosine: the defaults are the paper's
        stages=(
            projector.model_copy(update={"data": one_epoch("data/stage1.jsonl")}),
            vpit.model_copy(update={"data": one_epoch("data/stage2.jsonl")}),
        ),
    )
