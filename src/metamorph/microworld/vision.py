"""The microworld's SigLIP-class encoder: its sizes, its training task, and the dense objective on visual tokens.

Contrastive training alone leaves shape unreadable in the pooled, normalised visual tokens (measured: 27% by a
linear probe at 100% contrastive accuracy). So a small captioning decoder reads exactly those tokens and spells
out every cell, and every single token names what stands in its own cell, beside the sigmoid loss with hard
negatives in which one attribute is changed.

Axes: b images, c those with captions, t and s positions of captions and dense captions, k visual tokens per image, v vision width,
a attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.batch import IGNORE_INDEX
from metamorph.losses import LossTerm
from metamorph.microworld.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, SIZES, TINY, Scene, crop_cell, render
from metamorph.microworld.token_labels import TokenReader, crop_labels, token_labels
from metamorph.microworld.world import SceneRules, caption, choose, dense_caption, describe, sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SiglipModel

WIDTH, PATCH, NUM_VISUAL_TOKENS, TEXT_LENGTH, DENSE_LENGTH = 128, 8, 16, 32, 24
ENCODER_RULES = SceneRules(use="any", marking_rate=0.4, glyph_rate=0.08, tiny_rate=0.1)
CROP_RATE = 0.12


def build_siglip(vocabulary_size: int, pad_token_id: int) -> SiglipModel:
    """A SigLIP model of microworld size with fresh weights: 64 x 64 pixels, patch 8, width 128."""
    from transformers import SiglipConfig, SiglipModel

    vision = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SiglipModel(
        SiglipConfig(
            vision_config={**vision, "image_size": IMAGE_SIZE, "patch_size": PATCH},
            text_config={
                **text,
                "vocab_size": vocabulary_size,
                "max_position_embeddings": TEXT_LENGTH,
                "pad_token_id": pad_token_id,
                "bos_token_id": None,
                "eos_token_id": pad_token_id,
                "projection_size": WIDTH,
            },
        )
    )


class DenseCaptioner(nn.Module):
    """A small causal decoder that reads k visual tokens by cross-attention and writes the dense caption."""

    def __init__(self, vocabulary_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.memory = nn.Linear(WIDTH, WIDTH)
        self.memory_positions = nn.Parameter(torch.randn(NUM_VISUAL_TOKENS, WIDTH) * 0.02)
        self.words = nn.Embedding(vocabulary_size, WIDTH)
        self.positions = nn.Parameter(torch.randn(DENSE_LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary_size, bias=False)

    def forward(self, ids: Int64[Tensor, "b t"], tokens: Float[Tensor, "b k v"]) -> Float[Tensor, "b t vocabulary"]:
        """Logits of the next id at every position."""
        memory = self.memory(tokens * WIDTH**0.5) + self.memory_positions
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        hidden = self.words(ids) + self.positions[: ids.shape[1]]
        return self.head(self.layers(hidden, memory, tgt_mask=mask, tgt_is_causal=True))


class EncoderTraining(nn.Module):
    """What is trained together: the SigLIP model that ships, the captioner and the token reader that do not."""

    def __init__(self, siglip: SiglipModel, pool: Callable[[Tensor], Tensor], captioner: DenseCaptioner, reader: TokenReader) -> None:
        super().__init__()
        self.siglip, self.captioner, self.reader, self.pool = siglip, captioner, reader, pool


@dataclass
class EncoderBatch:
    """Pixels, captions of the first c of them followed by as many hard negatives, dense captions and token labels of all."""

    pixels: Float[Tensor, "b 3 h w"]
    texts: Int64[Tensor, "two_c t"]
    matches: Bool[Tensor, "c two_c"]
    dense: Int64[Tensor, "b s"]
    labels: Int64[Tensor, "b k a"]
    pad_id: int
    ids: tuple[str, ...] = ()
    target_counts: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> EncoderBatch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("pixels", "texts", "matches", "dense", "labels")}
        return replace(self, **moved)


def one_attribute_changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed: a hard negative for the contrastive loss."""
    thing = choose(rng, scene.objects)
    kind = choose(rng, ("shape", "shape", "colour", "size", "cell", "background"))
    if kind == "background":
        return replace(scene, background=choose(rng, [b for b in BACKGROUNDS if b != scene.background]))
    if kind == "cell" and scene.free_cells:
        return scene.without(thing.cell).with_object(replace(thing, cell=choose(rng, scene.free_cells)))
    if kind == "size":
        return scene.with_object(replace(thing, size=choose(rng, [s for s in (*SIZES, TINY) if s != thing.size])))
    if kind == "colour":
        return scene.with_object(replace(thing, colour=choose(rng, [c for c in COLOURS if c != thing.colour])))
    return scene.with_object(replace(thing, shape=choose(rng, [s for s in SHAPES if s != thing.shape])))


class TrainingPicture(NamedTuple):
    """One picture with all that is said of it."""

    pixels: np.ndarray
    caption: str
    negative: str
    dense: str
    labels: np.ndarray


def training_picture(rng: np.random.Generator) -> TrainingPicture:
    """A fresh picture (some are crops of one cell), its caption, a hard negative, its dense caption and token labels."""
    scene = sample_scene(rng, ENCODER_RULES)
    changed = one_attribute_changed(scene, rng)
    if rng.random() < CROP_RATE:
        thing = choose(rng, scene.objects)
        wrong = changed.at(thing.cell)
        texts = [f"close {describe(o)} on {s.background}" if o else "close nothing" for o, s in ((thing, scene), (wrong, changed))]
        labels = crop_labels(scene, thing.cell, NUM_VISUAL_TOKENS)
        return TrainingPicture(crop_cell(render(scene), thing.cell), texts[0], texts[1], texts[0], labels)
    labels = token_labels(scene, NUM_VISUAL_TOKENS)
    return TrainingPicture(render(scene), caption(scene, rng), caption(changed, rng), dense_caption(scene), labels)


def to_pixels(pictures: list[np.ndarray]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pictures as the encoder reads them: -1..1, channels first."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encoder_batch(tokenizer: PreTrainedTokenizerFast, size: int, rng: np.random.Generator) -> EncoderBatch:
    """A batch of fresh pictures with their texts."""
    pictures = [training_picture(rng) for _ in range(size)]
    captioned = pictures[: size // 4]  # the text tower costs as much as the encoder, and its task is soon learned
    captions, negatives = [one.caption for one in captioned], [one.negative for one in captioned]
    texts = tokenizer(captions + negatives, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    ends = [one.dense + tokenizer.eos_token for one in pictures]
    dense_ids = tokenizer(ends, padding=True, truncation=True, max_length=DENSE_LENGTH + 1, return_tensors="pt")["input_ids"]
    pad_id = int(tokenizer.pad_token_id)
    everything = captions + negatives
    matches = torch.tensor([[ours == other for other in everything] for ours in captions])
    labels = torch.from_numpy(np.stack([one.labels for one in pictures]))
    counts = {"contrastive": len(captioned), "caption": int((dense_ids != pad_id).sum()), "token": int((labels != IGNORE_INDEX).sum())}
    pixels = to_pixels([one.pixels for one in pictures])
    return EncoderBatch(pixels, texts["input_ids"], matches, dense_ids, labels, pad_id, target_counts=counts)


def encoder_step(model: EncoderTraining, batch: EncoderBatch) -> dict[str, LossTerm]:
    """The three losses: sigmoid contrastive (SigLIP, summed over pairs, per image), dense captioning, token labelling."""
    siglip = model.siglip
    seen = siglip.vision_model(pixel_values=batch.pixels, output_hidden_states=True)
    read = siglip.text_model(input_ids=batch.texts)
    similarity = F.normalize(seen.pooler_output[: len(batch.matches)], dim=-1) @ F.normalize(read.pooler_output, dim=-1).T
    logits_per_image = similarity * siglip.logit_scale.exp() + siglip.logit_bias
    signs = torch.where(batch.matches, 1.0, -1.0)
    contrastive = -F.logsigmoid(signs * logits_per_image).sum()
    tokens = model.pool(seen.hidden_states[-1])
    starts = F.pad(batch.dense, (1, 0), value=batch.pad_id)[:, :-1]
    logits = model.captioner(starts, tokens)
    targets = batch.dense.masked_fill(batch.dense == batch.pad_id, IGNORE_INDEX)
    caption_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    sums = {"contrastive": contrastive, "caption": caption_sum, "token": model.reader.loss_sum(tokens, batch.labels)}
    return {kind: LossTerm(value, torch.tensor(batch.target_counts[kind], device=value.device)) for kind, value in sums.items()}
