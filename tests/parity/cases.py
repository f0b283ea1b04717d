"""The authors' cases as inputs of our model. `data/README.md` states every convention of theirs.

Every case that is in the files is run. METAMORPH_PARITY_DATA names another folder with the same four files, for cases that are not here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metamorph.batch import IGNORE_INDEX, TokenSequence

DATA = Path(os.environ.get("METAMORPH_PARITY_DATA", Path(__file__).parent / "data"))
PLACEHOLDER = -200  # an image, in their ids


@dataclass(frozen=True)
class Data:
    """What lies in the folder."""

    root: Path = DATA

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.root / "config.json").read_text())

    @cached_property
    def results(self) -> dict[str, Any]:
        return json.loads((self.root / "expected.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.root / "batches.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.root / "expected.safetensors")

    @property
    def k(self) -> int:
        return self.config["num_image_tokens"]

    def expected(self, case: str) -> dict[str, Tensor]:
        """The tensors of a case, by what they are."""
        return {name.removeprefix(f"{case}."): value for name, value in self.outputs.items() if name.startswith(f"{case}.")}

    def gradients(self, case: str) -> dict[str, Tensor]:
        """Full gradients by their parameter names; empty where there are none."""
        prefix = f"grad.{case}."
        return {name.removeprefix(prefix): value for name, value in self.outputs.items() if name.startswith(prefix)}

    def rows(self, case: str) -> list[TokenSequence]:
        """The rows of a case, each with its own images."""
        ids = self.inputs[f"{case}.input_ids"]
        labels = self.inputs.get(f"{case}.labels", torch.full_like(ids, IGNORE_INDEX))
        mask = self.inputs.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
        images = iter(self.inputs["images"][self.inputs[f"{case}.image_index"]])
        own = [self._row(ids[row, real], labels[row, real], images, f"{case} {row}") for row, real in enumerate(mask)]
        assert not list(images), "every image belongs to a row, or is the empty one that a row of text spends"
        return own

    def _row(self, ids: Tensor, labels: Tensor, images: Any, name: str) -> TokenSequence:
        out_ids, out_labels, pixels, targets = [], [], [], []
        for place, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            if token == PLACEHOLDER:
                out_ids += [self.config["vocab_size"]] * self.k  # our placeholder; it needs no row in the embeddings
                out_labels += [IGNORE_INDEX] * self.k
                pixels.append(next(images))
                targets.append(place > 0 and labels[place - 1].item() == self.config["image_start_token_id"])
            else:
                out_ids.append(token)
                out_labels.append(label)
        if not pixels:
            next(images, None)  # their training data spends an all-zero image on a row without any; ours does not: it is thrown away here
        side = self.inputs["images"].shape[-1]
        input_ids = torch.tensor(out_ids)
        return TokenSequence(
            input_ids=input_ids,
            labels=torch.tensor(out_labels),
            is_visual=input_ids == self.config["vocab_size"],
            pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side),
            from_pixels=torch.ones(len(pixels), dtype=torch.bool),
            visual_targets=torch.tensor(targets, dtype=torch.bool),
            id=name,
        )


def official_checkpoint(directory: Path, *, lm_head: Tensor | None = None, **settings: Any) -> Path:
    """A folder in the authors' layout: their weights, with another text head or other settings if asked for."""
    directory.mkdir(parents=True)
    if lm_head is None:
        shutil.copyfile(DATA / "weights.safetensors", directory / "model.safetensors")
    else:
        save_file(load_file(DATA / "weights.safetensors") | {"lm_head.weight": lm_head}, directory / "model.safetensors")
    config = json.loads((DATA / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def number(value: float | str | None) -> float:
    """Numbers as the results file spells them."""
    return math.nan if value in ("NaN", None) else float(value)
