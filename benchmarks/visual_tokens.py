"""How many visual tokens? The microworld's demo recipe and a short decoder, alike for k = 4, 16 and 64, and what each of them can do.

    python benchmarks/visual_tokens.py --k 4 16 64        # about an hour on one core; an interrupted run goes on

The shipped encoder was trained so that its 16 tokens tell everything about a scene; 4 and 64 are pooled from the same 8 x 8 patches.
Everything else is equal: data, steps, rates, seed. The shipped decoder reads 16 tokens only, so each k gets a decoder of its own, trained
for fewer steps than the shipped one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from metamorph.evaluation.runner import evaluate
from metamorph.microworld.components import BASE_TRAINING, Build, NumberedStream, build, shipped
from metamorph.microworld.diffusion import decoder_batches, decoder_from_base
from metamorph.microworld.subject import Subject
from metamorph.microworld.suite import evaluation_tasks
from metamorph.pipeline import MetaMorphPipeline
from metamorph.recipes.microworld import microworld_demo
from metamorph.training.loop import train
from metamorph.training.run import run

TASKS = {"vqa": 540, "drawing": 300, "reconstruction": 300, "names_in_text": 512}
FIGURES = (
    "vqa_accuracy",
    "vqa_blind",
    "drawing_exact",
    "drawing_attribute_accuracy",
    "reconstruction_exact",
    "token_skill",
    "names_in_text",
)
SKETCH_STEPS, DECODER_STEPS = 2000, 600


def parts(work: Path) -> Path:
    """The shipped language model and encoder, and a text-conditioned diffusion base, from which every decoder starts."""
    directory = work / "parts"
    for name in ("llm", "encoder"):
        if not (directory / name).is_dir():
            shutil.copytree(shipped(name), directory / name)
    build(Build(directory, directory / "training"), ("base",))
    return directory


def train_decoder(work: Path, base: Path, pipeline: MetaMorphPipeline, k: int, seed: int) -> Path:
    """A decoder for k visual tokens: sketch, then denoiser."""
    from metamorph.decoder import VisualDecoderPipeline, WeightAverage, decoder_step, sketch_step

    out = work / "decoder"
    if not (out / "model_index.json").is_file():
        torch.manual_seed(seed)
        model = decoder_from_base(base, k)
        encode = pipeline.model.encode_images
        sketch = BASE_TRAINING.model_copy(update={"steps": SKETCH_STEPS, "learning_rate": 2e-3, "warmup_ratio": 0.02, "log_every": 50})
        train(sketch_step, model, NumberedStream(decoder_batches(encode, 32, seed)), sketch, work, stage="sketch", resume=True)
        average = WeightAverage(model, decay=0.995)
        stream = NumberedStream(decoder_batches(encode, 32, seed + 1, regression_errors=True))
        config = BASE_TRAINING.model_copy(update={"steps": DECODER_STEPS})
        train(decoder_step, model, stream, config, work, stage="decoder", resume=True, companions={"average": average})
        average.copy_to(model)
        VisualDecoderPipeline.from_model(model).save_pretrained(out)
    return out


def measure(work: Path, k: int, seed: int) -> dict:
    """Train and evaluate one k."""
    recipe = microworld_demo().with_overrides({"output_dir": str(work / "vpit"), "model.overrides.num_visual_tokens": k})
    recipe = recipe.with_overrides({f"stages.{n}.training.seed": seed for n in range(2)} | {"data.sources.0.kwargs.seed": seed})
    began = time.perf_counter()
    result = run(recipe, resume=True)
    pipeline = MetaMorphPipeline.from_pretrained(result.model_dir, device="cpu")
    decoder = train_decoder(work, work.parent / "parts" / "base", pipeline, k, seed)
    subject = Subject(MetaMorphPipeline.from_pretrained(result.model_dir, decoder, device="cpu"), shipped("llm"))
    tasks = [task for task in evaluation_tasks(full=True) if task.name in TASKS]
    found = evaluate(tasks, subject, seed=seed, samples=TASKS)
    context = pipeline.model.config.text_config.max_position_embeddings
    return {
        "k": k,
        "seed": seed,
        "positions_per_image": k + 2,
        "images_in_context": context // (k + 2),
        "training_seconds": sum(one.seconds for one in result.stages.values()),
        "whole_seconds": time.perf_counter() - began,
        "metrics": {name: found.metrics[name].to_dict() for name in FIGURES},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--k", type=int, nargs="+", default=[4, 16, 64])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--work", type=Path, default=Path("runs/visual-tokens"))
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/visual_tokens.json"))
    given = arguments.parse_args()
    parts(given.work)
    rows = {}
    if given.out.is_file():
        rows = {(row["k"], row["seed"]): row for row in json.loads(given.out.read_text())["rows"]}
    for k in given.k:
        if (k, given.seed) not in rows:
            rows[k, given.seed] = measure(given.work / f"k{k}-seed{given.seed}", k, given.seed)
        command = "python benchmarks/visual_tokens.py --k " + " ".join(str(k) for k, _ in sorted(rows))
        given.out.write_text(json.dumps({"command": command, "rows": [rows[key] for key in sorted(rows)]}, indent=2) + "\n")
        print(json.dumps(rows[k, given.seed], indent=2))


if __name__ == "__main__":
    main()
