"""Train a MetaMorph with TRL's SFTTrainer, which needs one change: it must use the loss that the model returns.

SFTTrainer (1.16) computes its loss itself, from the log-probabilities of the text tokens: the visual loss would be left out and the vision
head would learn nothing. (Tried as it is, MetaMorph refuses: "images to predict but no labels".) With `compute_loss` of transformers'
Trainer the loss and gradients are those of examples/hf_trainer.py; what TRL adds is its configuration and `peft_config`.

Rows become tensors in the collator, so the dataset holds only their numbers and TRL's own preparation is skipped.

    pip install "trl>=1.16" "peft>=0.21"
    python examples/trl_sft.py --out runs/trl
"""

import argparse
from pathlib import Path

import peft
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from metamorph.data.collate import pad
from metamorph.microworld.components import shipped
from metamorph.microworld.examples import training_source
from metamorph.model import initialize
from metamorph.model.adapters import lora_settings


class VPiTTrainer(SFTTrainer):
    """SFTTrainer with the model's own loss: text + visual."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What transformers' Trainer does."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def main(out: Path, steps: int) -> list[float]:
    model, processor = initialize(shipped("llm"), shipped("encoder"), num_visual_tokens=16)
    examples = training_source({"image_qa": 0.5, "generation": 0.5})

    def collate(rows: list[dict[str, int]]) -> dict:
        return pad([processor.encode(examples[row["number"]].messages) for row in rows]).model_inputs()

    arguments = SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = VPiTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"number": list(range(8 * steps))}),
        data_collator=collate,
        processing_class=processor,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, **lora_settings(model)),
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a MetaMorph with TRL's SFTTrainer.")
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    main(options.out, options.steps)
