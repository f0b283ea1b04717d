"""The paper's diffusion decoder (docs/paper.md, section 6).

The same settings start from a diffusion transformer of Sana's class: give its directory as `base`, its image size to the batches, and leave
`objective` out, which is then as Sana was trained. There is no recipe for it: we know of no published rates and steps for that move.
"""

from __future__ import annotations

from metamorph.training.config import DecoderConfig, RunConfig, SourceConfig, StageConfig, TrainingConfig


def sd15_decoder() -> RunConfig:
    """Stable Diffusion 1.5, moved from texts to visual tokens. Needs a saved MetaMorph and rows that name images."""
    warmup, decline = 2_000, 12_000
    return RunConfig(
        name="sd15-decoder",
        description="The paper's decoder: projector and U-Net trained on images and their visual tokens; the VAE is frozen.",
        decoder=DecoderConfig(
            encoder="runs/metamorph-llama3.1-8b/model",
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            latent=True,
            conditioner={"hidden_size": 2048},
            objective={"times": "uniform", "time_shift": 1.0, "condition_dropout": 0.7},
            batches=SourceConfig(
                source="metamorph.training.images.image_batches",
                kwargs={
                    "source": "metamorph.data.source.open_source",
                    "kwargs": {"path": "data/images.jsonl", "needs_answer": False},
                    "image_size": 512,
                },
            ),
        ),
        stages=(
            StageConfig(
                name="decoder",
                freeze=("vae",),
                training=TrainingConfig(
                    # "Logarithmic warm-up in 2,000 steps to 1.1e-5, then linear to 0 over 12,000", read as 14,000 steps in all.
                    steps=warmup + decline,
                    batch_size=2112,
                    micro_batch_size=8,
                    learning_rate=1.1e-5,
                    warmup="logarithmic",
                    warmup_ratio=warmup / (warmup + decline),
                    schedule="linear",
                    weight_decay=0.01,
                    betas=(0.9, 0.999),
                    checkpoint_every=500,
                ),
            ),
        ),
    )
