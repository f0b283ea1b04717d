"""What is evaluated in the microworld, and how it is asked: many conversations at once, greedily, drawings decoded together.

Axes: n images, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from metamorph.batch import TokenSequence
from metamorph.messages import Message
from metamorph.microworld.examples import draw
from metamorph.microworld.rows import Picture
from metamorph.microworld.vision import to_pixels
from metamorph.model.events import Answer
from metamorph.model.generation import generate
from metamorph.model.state import DecodingOptions
from metamorph.pipeline import MetaMorphPipeline

ROWS = 64  # conversations that are answered side by side
WORDS = 56  # positions for text in an answer, beside those of one image
DENOISING_STEPS = 4  # for each drawing; ten are no better in this world (LAB_LOG.md, 2026-11-22)


@dataclass(frozen=True)
class Subject:
    """A model with its decoder, and the language model as it was before VPiT."""

    pipeline: MetaMorphPipeline
    llm_before: Path
    steps: int = DENOISING_STEPS

    @torch.no_grad()
    def answer(
        self, conversations: Sequence[Sequence[Message]], *, allow_images: bool = True, max_new_tokens: int | None = None
    ) -> list[Answer]:
        """Greedy answers; by default as long as some words and an image are."""
        prompts = [self.pipeline.encode(messages) for messages in conversations]
        return self.go_on(prompts, allow_images=allow_images, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def go_on(self, prompts: Sequence[TokenSequence], *, allow_images: bool = True, max_new_tokens: int | None = None) -> list[Answer]:
        """Greedy continuations of token sequences."""
        longest = max_new_tokens or WORDS + self.pipeline.model.config.num_visual_tokens
        options = DecodingOptions(max_new_tokens=longest, max_images=3, allow_images=allow_images)
        return generate(self.pipeline.model, self.pipeline.processor, prompts, options, max_rows=ROWS)

    def decode(self, tokens: Sequence[Float[Tensor, "k v"] | None], seed: int = 0) -> list[Image.Image | None]:
        """Pixels of drawings; None where nothing was drawn."""
        there = [index for index, one in enumerate(tokens) if one is not None]
        pictures: list[Image.Image | None] = [None] * len(tokens)
        if there:
            stacked = torch.stack([one for one in tokens if one is not None])
            drawn = self.pipeline.decode_images(stacked, seeds=[seed + index for index in there], steps=self.steps)
            for index, picture in zip(there, drawn, strict=True):
                pictures[index] = picture
        return pictures

    @torch.no_grad()
    def encode(self, pictures: Sequence[Picture]) -> Float[Tensor, "n k v"]:
        """True visual tokens of pictures."""
        model = self.pipeline.model
        parts = [
            model.encode_images(to_pixels([np.asarray(draw(picture)) for picture in pictures[start : start + 100]]))
            for start in range(0, len(pictures), 100)
        ]
        return torch.cat(parts).cpu()


def last_picture(answer: Answer) -> Float[Tensor, "k v"] | None:
    """The visual tokens of the last image of an answer, or None."""
    return answer.visual_tokens[-1].cpu() if answer.visual_tokens else None


def final_text(answer: Answer) -> str:
    """The text after the last image of an answer (all of it if there is none)."""
    parts = list(answer.message.parts)
    after = max((index for index, part in enumerate(parts) if not hasattr(part, "text")), default=-1) + 1
    return "".join(getattr(part, "text", "") for part in parts[after:]).strip()
