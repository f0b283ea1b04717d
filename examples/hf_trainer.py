"""Train a MetaMorph with transformers' Trainer: DDP, DeepSpeed, callbacks and trackers as you have them set up.

The model's `forward` returns the loss (text + visual), so Trainer needs only a collator. Two things to know:

- Each micro-batch divides its two losses by its own numbers of targets, and Trainer takes the mean over micro-batches and processes:
  what our own loop does with `normalization="micro_batch"`, and what the paper's authors did. Our loop's default divides by the numbers
  of targets of the whole step instead.
- `remove_unused_columns=False` if your dataset has columns; ours is a list-like object, whose rows the collator encodes.

    python examples/hf_trainer.py --out runs/hf-trainer
    accelerate launch --num_processes 2 --cpu examples/hf_trainer.py --out runs/hf-trainer
"""

import argparse
from pathlib import Path

from transformers import Trainer, TrainingArguments

from metamorph import Example, MetaMorphPipeline
from metamorph.data.collate import pad
from metamorph.microworld.components import shipped
from metamorph.microworld.examples import training_source
from metamorph.model import initialize


def main(out: Path, steps: int) -> None:
    # Any causal LM with a chat template and any vision encoder; these two come with the package.
    model, processor = initialize(shipped("llm"), shipped("encoder"), num_visual_tokens=16)
    examples = training_source({"image_qa": 0.5, "generation": 0.5})

    def collate(rows: list[Example]) -> dict:
        return pad([processor.encode(row.messages, id=row.id) for row in rows]).model_inputs()

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every parameter that trains has a path in every batch
    )
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate, processing_class=processor)
    trainer.train()
    trainer.save_model(str(out / "model"))  # weights, config, processor and a model card
    if trainer.is_world_process_zero():
        pipeline = MetaMorphPipeline.from_pretrained(out / "model", decoder=shipped("decoder"))
        reply = pipeline("Generate an image of a small red star at the top left", max_new_tokens=40)
        print(f"saved {out / 'model'}; asked to draw, it says {reply.text!r} and draws {len(reply.images)} image(s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a MetaMorph with transformers' Trainer.")
    parser.add_argument("--out", type=Path, default=Path("runs/hf-trainer"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    main(options.out, options.steps)
