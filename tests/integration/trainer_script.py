"""Two optimizer steps over the same micro-batches, by transformers' Trainer or by our loop; called, or started under torchrun.

Writes the accumulated gradients of both steps, the weights afterwards and the losses that were reported.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metamorph.batch import Batch, TokenSequence
from metamorph.data.collate import pad
from metamorph.messages import ImagePart, Message
from metamorph.model import MetaMorph, MetaMorphProcessor
from metamorph.training import TrainingConfig, train
from metamorph.training.assembly import vpit_step
from metamorph.training.device import pick_device, processes, rank, world_size
from metamorph.training.trackers import SilentTracker

STEPS, ACCUMULATION, ROWS, RATE = 2, 2, 2, 1e-3


def picture(seed: int) -> ImagePart:
    return ImagePart(visual_tokens=torch.nn.functional.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)), dim=-1))


def sequences(processor: MetaMorphProcessor) -> list[TokenSequence]:
    """Sixteen rows: every micro-batch of two has other numbers of targets; the third and the fifth draw nothing, the fifth has no image."""
    rows = []
    for number in range(16):
        words = "word " * (1 + number % 5)
        kind = number // ROWS
        if kind == 2:
            turns = [Message.user(picture(number), "What?"), Message.assistant(words)]
        elif kind == 4:
            turns = [Message.user("Say"), Message.assistant(words * 2)]
        elif number % 3 == 0:
            turns = [Message.user("Two"), Message.assistant(words, picture(number), " and ", picture(number + 50))]
        else:
            turns = [Message.user("Draw"), Message.assistant(words, picture(number))]
        rows.append(processor.encode(turns, id=f"row{number}"))
    return rows


class Rows:
    """The micro-batches of each step on this process, dealt out as Trainer deals them: one to each process in turn."""

    def __init__(self, rows: list[TokenSequence]) -> None:
        self.rows, self.taken = rows, 0

    def __next__(self) -> list[Batch]:
        first = self.taken * ACCUMULATION * world_size()
        self.taken += 1
        numbers = [first + turn * world_size() + rank() for turn in range(ACCUMULATION)]
        return [pad(self.rows[number * ROWS : (number + 1) * ROWS]) for number in numbers]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().contiguous()


ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": ACCUMULATION,
    "train_sampling_strategy": "sequential",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,  # the model promises a path to every parameter
}


def with_trainer(model: MetaMorph, rows: list[TokenSequence], out: Path) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(out / "run"), **ARGUMENTS)
    return logged(Trainer(model, arguments, train_dataset=rows, data_collator=lambda rows: pad(rows).model_inputs()))  # pyright: ignore


def with_sft_trainer(model: MetaMorph, rows: list[TokenSequence], out: Path, own_loss: bool = True) -> list[float]:
    """TRL's trainer, with the model's own loss as in examples/trl_sft.py, or as it is."""
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class VPiTTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "bf16": False, "max_length": None}
    return logged(
        (VPiTTrainer if own_loss else SFTTrainer)(
            model,
            SFTConfig(str(out / "run"), **ARGUMENTS, **more),
            train_dataset=Dataset.from_dict({"number": list(range(len(rows)))}),
            data_collator=lambda batch: pad([rows[row["number"]] for row in batch]).model_inputs(),
            processing_class=MetaMorphProcessor.from_pretrained(model.name_or_path),
        )
    )


def logged(trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_our_loop(model: MetaMorph, rows: list[TokenSequence], out: Path) -> list[float]:
    config = TrainingConfig(
        steps=STEPS,
        learning_rate=RATE,
        schedule="constant",
        warmup_ratio=0.0,
        grad_clip=None,
        normalization="micro_batch",
        precision="float32",
        log_every=1,
        device="cpu",
    )
    result = train(vpit_step, model, Rows(rows), config, out / "run", tracker=SilentTracker(), replicate=("vision_encoder",))
    return [row["loss"] for row in result.history]


def measure(mode: str, directory: Path, out: Path) -> None:
    model, processor = MetaMorph.from_pretrained(directory), MetaMorphProcessor.from_pretrained(directory)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors: dict[str, Tensor] = {}

    def keep_gradients(*_) -> None:
        step = 1 + sum(name.startswith("step") for name in tensors)
        tensors[f"step {step}"] = torch.tensor(step)
        for name in trained:
            parameter = model.get_parameter(name)  # sharding replaces it
            assert parameter.grad is not None, f"no path to {name}"
            tensors[f"gradient {step} {name}"] = whole(parameter.grad)

    out.mkdir(parents=True, exist_ok=True)
    with processes(pick_device("cpu")):
        hook = register_optimizer_step_pre_hook(keep_gradients)
        try:
            losses = {"trainer": with_trainer, "sft": with_sft_trainer, "loop": with_our_loop}[mode](model, sequences(processor), out)
        finally:
            hook.remove()
        tensors |= {f"weight {name}": whole(model.get_parameter(name)) for name in trained}
        if rank() == 0:
            save_file(tensors, out / "tensors.safetensors")
            (out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    # Everything is measured and written. Once in some dozens of runs a thread of torch's own, still joinable when the interpreter takes
    # its libraries down, aborts the process ("terminate called without an active exception"); that end is not what is tested here.
    sys.stdout.flush()
    os._exit(0)
