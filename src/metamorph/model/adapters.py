"""What an adapter (PEFT's LoRA) must train of a MetaMorph: linear layers of the LLM, both bridges, and the rows of the new tokens.

PEFT itself is not needed here:

    peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, **lora_settings(model)))

Axes: none; names of modules.
"""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from metamorph.model.modeling import MetaMorph


def lora_targets(model: MetaMorph) -> str:
    """A regular expression for `LoraConfig(target_modules=...)` that matches every linear layer inside the LLM, and nothing else.

    A list of plain names such as `q_proj` would also match the vision encoder, whose attention uses the same ones. The text head is left
    out: adapters train the rows of the new tokens instead.
    """
    decoder = model.get_decoder()
    inside = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return rf"{re.escape(_name_of(model, decoder))}\..*\.({'|'.join(sorted(map(re.escape, inside)))})"


def lora_settings(model: MetaMorph) -> dict[str, Any]:
    """The arguments of `LoraConfig` that depend on the model; rank, scale and dropout are the user's.

    Projector and vision head are trained and saved whole. Of the embeddings, only the rows of `<image_start>` and `<image_end>` train,
    also where input and output embeddings are one matrix; a text head with biases, of which PEFT cannot train single rows, trains whole.
    """
    rows = [model.config.image_start_token_id, model.config.image_end_token_id]
    head = model.get_output_embeddings()
    embeddings, head_name = _name_of(model, model.get_input_embeddings()), _name_of(model, head)
    whole = ["projector", "vision_head"]
    by_row = {embeddings: rows}
    if getattr(head, "bias", None) is None:
        by_row[head_name] = rows
    else:
        whole.append(head_name)
    return {"target_modules": lora_targets(model), "modules_to_save": whole, "trainable_token_indices": by_row}


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
