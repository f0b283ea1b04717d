"""What a model reads: one tokenized conversation, and a batch of them, as named tensors.

Axes: b sequences (rows), t positions, n images (flat, in reading order), m images that come as pixels, k visual tokens per image,
v vision width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from metamorph.errors import AlignmentError

IGNORE_INDEX = -100
"""The label of a position that is not a text target."""

DocumentLengths = tuple[tuple[int, ...], ...]
"""For every row the lengths of the documents packed into it, left to right; what is left of the row is padding."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One conversation as a model reads it. `labels[i]` is the text target *at* position i; losses shift it.

    Raises:
        AlignmentError: the tensors disagree about the number of positions or images.
    """

    input_ids: Int64[Tensor, " t"]
    labels: Int64[Tensor, " t"]
    is_visual: Bool[Tensor, " t"]
    pixel_values: Float[Tensor, "m 3 h w"]
    visual_tokens: Float[Tensor, "n k v"] | None = None  # rows are meaningful only where `from_pixels` is false
    from_pixels: Bool[Tensor, " n"]
    visual_targets: Bool[Tensor, " n"]  # images spoken by the assistant
    id: str = ""
    source: str = ""
    weight: float = 1.0
    turns_cut: int = 0  # last turns of the conversation that did not fit

    def __post_init__(self) -> None:
        """Check that the tensors describe the same positions and images."""
        place = self.id or "a sequence without id"
        t, n = len(self.input_ids), len(self.from_pixels)
        if len(self.labels) != t or len(self.is_visual) != t:
            raise AlignmentError(
                f"{len(self.labels)} labels and {len(self.is_visual)} image flags but {t} positions ({place}). Build them together."
            )
        if len(self.visual_targets) != n:
            raise AlignmentError(f"{len(self.visual_targets)} target flags but {n} images ({place}). Give one flag for each image.")
        check_image_counts(self.is_visual, self.pixel_values, self.visual_tokens, self.from_pixels, place)

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        """Number of images, from pixels or not."""
        return len(self.from_pixels)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens (positions) per image; 0 without an image."""
        return int(self.is_visual.sum()) // self.num_images if self.num_images else 0

    @property
    def num_text_targets(self) -> int:
        """Labelled positions that something precedes: the first position cannot be predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())

    @property
    def num_visual_targets(self) -> int:
        """Visual tokens to predict: target images times tokens per image."""
        return int(self.visual_targets.sum()) * self.tokens_per_image


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one or more conversations, padded to one length. Images are flat over the batch, row by row, left to right."""

    input_ids: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    position_ids: Int64[Tensor, "b t"]
    is_visual: Bool[Tensor, "b t"]
    pixel_values: Float[Tensor, "m 3 h w"]
    visual_tokens: Float[Tensor, "n k v"] | None = None
    from_pixels: Bool[Tensor, " n"]
    visual_targets: Bool[Tensor, " n"]
    document_lengths: DocumentLengths | None = None  # None: one document per row
    target_weights: Float[Tensor, "b t"] | None = None  # weight of the target at each position (per source); None: all 1
    target_counts: Mapping[str, int] = field(default_factory=dict)  # {"text": positions, "visual": visual tokens}, made by the collator
    ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    turns_cut: tuple[int, ...] = ()  # how many turns each document lost to the limit of length

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens per image; 0 without an image."""
        return int(self.is_visual.sum()) // len(self.from_pixels) if len(self.from_pixels) else 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """Move every tensor to `device`; pixels and visual tokens also to `dtype`, if given."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name in ("pixel_values", "visual_tokens"):
            if dtype is not None and name in moved:
                moved[name] = moved[name].to(dtype)
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of `MetaMorph.forward`."""
        not_inputs = ("target_counts", "ids", "sources", "turns_cut")
        return {name: value for name, value in vars(self).items() if name not in not_inputs}

    def documents_of_targets(self) -> dict[str, Int64[Tensor, " _"]]:
        """For each kind, which document (by its number in `ids` and `sources`) each target belongs to, in the order of the losses."""
        lengths = self.document_lengths if self.document_lengths is not None else [(self.input_ids.shape[1],)] * len(self)
        documents = torch.zeros_like(self.input_ids)
        number = 0
        for row, row_lengths in enumerate(lengths):
            spans = torch.tensor(row_lengths)
            documents[row, : int(spans.sum())] = torch.arange(number, number + len(spans)).repeat_interleave(spans).to(documents.device)
            number += len(spans)
        text = predictable(self.attention_mask, self.document_lengths) & (self.labels != IGNORE_INDEX)
        drawn = (
            documents[self.is_visual].view(len(self.visual_targets), -1)[self.visual_targets] if len(self.visual_targets) else documents[:0]
        )
        return {"text": documents[text], "visual": drawn.flatten()}

    def split_into(self, parts: int) -> list["Batch"]:
        """Cut into at most `parts` batches of whole rows, as even as possible, each with its own target counts."""
        rows = torch.arange(len(self)).tensor_split(min(parts, len(self)))
        return [self._rows(int(part[0]), int(part[-1]) + 1) for part in rows]

    def _rows(self, start: int, stop: int) -> "Batch":
        images = self.is_visual.sum(dim=1) // max(self.tokens_per_image, 1)
        first, last = int(images[:start].sum()), int(images[:stop].sum())
        first_pixels, last_pixels = int(self.from_pixels[:first].sum()), int(self.from_pixels[:last].sum())
        row_tensors = ("input_ids", "labels", "attention_mask", "position_ids", "is_visual", "target_weights")
        image_tensors = ("visual_tokens", "from_pixels", "visual_targets")
        cut = {name: value[start:stop] for name in row_tensors if (value := getattr(self, name)) is not None}
        cut |= {name: value[first:last] for name in image_tensors if (value := getattr(self, name)) is not None}
        lengths = None if self.document_lengths is None else self.document_lengths[start:stop]
        counts = count_targets(cut["labels"], cut["attention_mask"], cut["visual_targets"], self.tokens_per_image, lengths)
        documents = [len(row) for row in self.document_lengths] if self.document_lengths is not None else [1] * len(self)
        first_id, last_id = sum(documents[:start]), sum(documents[:stop])
        return replace(
            self,
            **cut,
            pixel_values=self.pixel_values[first_pixels:last_pixels],
            document_lengths=lengths,
            target_counts=counts,
            **{
                name: values[first_id:last_id] if len(values := getattr(self, name)) == sum(documents) else values
                for name in ("ids", "sources", "turns_cut")
            },
        )


def predictable(attention_mask: Bool[Tensor, "b t"], document_lengths: DocumentLengths | None = None) -> Bool[Tensor, "b t"]:
    """True where a position is real and the one before it is real and of the same document, so that a state can predict it."""
    real = attention_mask.bool()
    result = torch.zeros_like(real)
    result[:, 1:] = real[:, 1:] & real[:, :-1]
    for row, lengths in enumerate(document_lengths or ()):
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        result[row, starts.to(result.device)] = False
    return result


def count_targets(
    labels: Int64[Tensor, "b t"],
    attention_mask: Bool[Tensor, "b t"],
    visual_targets: Bool[Tensor, " n"],
    tokens_per_image: int,
    document_lengths: DocumentLengths | None = None,
) -> dict[str, int]:
    """Number of targets of each kind, by which the losses of a step are divided: labelled positions, and visual tokens of target images."""
    text = int(((labels != IGNORE_INDEX) & predictable(attention_mask, document_lengths)).sum())
    return {"text": text, "visual": int(visual_targets.sum()) * tokens_per_image}


def check_image_counts(
    is_visual: Bool[Tensor, "..."],
    pixel_values: Float[Tensor, "m 3 h w"] | None,
    visual_tokens: Float[Tensor, "n k v"] | None,
    from_pixels: Bool[Tensor, " n"],
    place: str,
) -> None:
    """Compare positions, pixels and visual tokens with the number of images.

    Raises:
        AlignmentError: with both numbers.
    """
    positions, n, from_pixel_count = int(is_visual.sum()), len(from_pixels), int(from_pixels.sum())
    pixels = 0 if pixel_values is None else len(pixel_values)
    if pixels != from_pixel_count:
        raise AlignmentError(
            f"{pixels} pixel images but {from_pixel_count} images flagged `from_pixels` ({place}). Give pixels for exactly those."
        )
    if visual_tokens is not None and len(visual_tokens) != n:
        raise AlignmentError(f"{len(visual_tokens)} rows of visual tokens but {n} images ({place}). Give one row for each image.")
    if visual_tokens is None and from_pixel_count != n:
        raise AlignmentError(f"no visual tokens but {n - from_pixel_count} images without pixels ({place}). Give `visual_tokens`.")
    if (n == 0 and positions) or (n and (positions % n or not positions)):
        raise AlignmentError(f"{positions} image positions but {n} images ({place}). Was the sequence cut inside an image?")
    if visual_tokens is not None and n and positions != n * visual_tokens.shape[1]:
        raise AlignmentError(
            f"{positions} image positions but {n} images x {visual_tokens.shape[1]} visual tokens ({place}). Was the sequence cut?"
        )


def check_labels(labels: Tensor | None, visual_targets: Bool[Tensor, " n"] | None, training: bool) -> None:
    """Refuse to train on images to be predicted without labels: no loss would be computed here, and the vision head would not learn.

    Raises:
        AlignmentError: a trainer took the labels out, to compute a loss of its own from the text's logits.
    """
    if training and labels is None and visual_targets is not None and torch.is_grad_enabled() and bool(visual_targets.any()):
        raise AlignmentError(
            f"{int(visual_targets.sum())} images to predict but no labels (MetaMorph.forward in training). "
            "Let the trainer use the loss that the model returns (docs/ecosystem.md)."
        )
