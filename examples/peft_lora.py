"""Low-rank adapters (PEFT's LoRA) on a MetaMorph: train little, save little, merge, and go on as with any model.

`lora_settings` names what must train: the linear layers of the LLM (not the vision encoder's, which have the same names), the projector
and the vision head as a whole, and of the embeddings only the rows of <image_start> and <image_end>.

    pip install "peft>=0.21"
    python examples/peft_lora.py --out runs/lora
"""

import argparse
from pathlib import Path

import peft
import torch

from metamorph import MetaMorphPipeline
from metamorph.data.collate import pad
from metamorph.microworld.components import shipped
from metamorph.microworld.examples import training_source
from metamorph.model import initialize
from metamorph.model.adapters import lora_settings

BATCH = 16


def main(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    base, processor = initialize(shipped("llm"), shipped("encoder"), num_visual_tokens=16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, **lora_settings(base)))
    model.print_trainable_parameters()

    examples = training_source({"image_qa": 0.5, "generation": 0.5})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for step in range(steps):
        rows = (examples[step * BATCH + i] for i in range(BATCH))
        batch = pad([processor.encode(row.messages, id=row.id) for row in rows])
        output = model(**batch.model_inputs())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  text {output.text_loss.item():.3f}  visual {output.visual_loss.item():.3f}")

    # The adapter alone: the LLM and the encoder are all that is needed beside it, whatever the seed of the new parts was.
    model.save_pretrained(out / "adapter")
    again, _ = initialize(shipped("llm"), shipped("encoder"), num_visual_tokens=16, seed=1)
    loaded = peft.PeftModel.from_pretrained(again, out / "adapter")

    # Or merged into the weights: an ordinary MetaMorph, with no trace of PEFT.
    merged = loaded.merge_and_unload()
    merged.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    pipeline = MetaMorphPipeline.from_pretrained(out / "model", decoder=shipped("decoder"))
    reply = pipeline("Generate an image of a small red star at the top left", max_new_tokens=40)
    print(f"saved {out / 'model'}; asked to draw, it says {reply.text!r} and draws {len(reply.images)} image(s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a MetaMorph with LoRA.")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    main(options.out, options.steps)
