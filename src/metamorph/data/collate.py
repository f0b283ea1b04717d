"""Token sequences -> one batch: padded, one per row, or packed, several per row; and back.

Nothing is ever cut: what does not fit is an error that names the record. Images stay flat, in reading order: row by row, left to right.

Axes: b rows, t positions, n images (flat), m images that come as pixels, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metamorph.batch import IGNORE_INDEX, Batch, TokenSequence, count_targets
from metamorph.errors import AlignmentError, ConfigError, ContextLengthError


def pad(
    sequences: Sequence[TokenSequence],
    *,
    side: Literal["right", "left"] = "right",
    pad_id: int = 0,
    max_length: int | None = None,
) -> Batch:
    """One sequence per row, filled to the longest with `pad_id` (masked, so any valid id will do).

    Positions count from 0 at each row's first real token, on either side. Generation pads left, training right.

    Raises:
        AlignmentError: no sequences, or images of different shapes.
        ContextLengthError: a sequence is longer than `max_length`.
    """
    if max_length is not None:
        _check_lengths(sequences, max_length)
    return _assemble([[sequence] for sequence in sequences], side, pad_id)


def pack(sequences: Sequence[TokenSequence], max_length: int, *, pad_id: int = 0) -> Batch:
    """Several sequences per row, greedily: each goes into the first row with room (first fit, in the given order).

    `document_lengths` says where documents end; positions restart at 0 in each, and none attends to another. Rows are filled to the
    longest row; a batch holds the same targets as its padded twin.

    Raises:
        AlignmentError: no sequences, or images of different shapes.
        ContextLengthError: a sequence is longer than `max_length`.
    """
    _check_lengths(sequences, max_length)
    return _assemble(
        [[sequences[i] for i in row] for row in first_fit([len(s) for s in sequences], max_length)], "right", pad_id, packed=True
    )


def pack_rows(rows: Sequence[Sequence[TokenSequence]], *, pad_id: int = 0) -> Batch:
    """The given sequences in the given rows, as `pack` lays them out.

    Raises:
        AlignmentError: no sequences, or images of different shapes.
    """
    return _assemble([list(row) for row in rows], "right", pad_id, packed=True)


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices into `lengths`: each item in the first row whose sum stays within `max_length`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        row = next((row for row, left in enumerate(room) if length <= left), None)
        if row is None:
            rows.append([])
            room.append(max_length)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= length
    return rows


def unpack(batch: Batch) -> list[TokenSequence]:
    """The sequences of a padded or packed batch, row by row, left to right: the inverse of `pad` and of `pack` (up to order)."""
    k = batch.tokens_per_image
    sequences: list[TokenSequence] = []
    image = pixel = 0
    for row in range(len(batch)):
        real = batch.attention_mask[row].nonzero().flatten()
        first = int(real[0]) if len(real) else 0
        lengths = (len(real),) if batch.document_lengths is None else batch.document_lengths[row]
        for length in lengths:
            span = slice(first, first + length)
            num_images = int(batch.is_visual[row, span].sum()) // max(k, 1)
            images = slice(image, image + num_images)
            num_pixels = int(batch.from_pixels[images].sum())
            number = len(sequences)
            sequences.append(
                TokenSequence(
                    input_ids=batch.input_ids[row, span],
                    labels=batch.labels[row, span],
                    is_visual=batch.is_visual[row, span],
                    pixel_values=batch.pixel_values[pixel : pixel + num_pixels],
                    visual_tokens=None if batch.visual_tokens is None else batch.visual_tokens[images],
                    from_pixels=batch.from_pixels[images],
                    visual_targets=batch.visual_targets[images],
                    id=batch.ids[number] if batch.ids else "",
                    source=batch.sources[number] if batch.sources else "",
                    weight=1.0 if batch.target_weights is None else float(batch.target_weights[row, first]),
                    turns_cut=batch.turns_cut[number] if batch.turns_cut else 0,
                )
            )
            first, image, pixel = first + length, image + num_images, pixel + num_pixels
    return sequences


def _check_lengths(sequences: Sequence[TokenSequence], max_length: int) -> None:
    if max_length < 1:
        raise ConfigError(f"max_length {max_length} but at least 1 is needed (collation). Raise it.")
    for sequence in sequences:
        if len(sequence) > max_length:
            found = f"{len(sequence)} positions with {sequence.num_images} images x {sequence.tokens_per_image} visual tokens"
            place = sequence.id or "a sequence without id"
            raise ContextLengthError(f"{found} but at most {max_length} fit ({place}). Raise max_length or leave the record out.")


def _assemble(rows: list[list[TokenSequence]], side: str, pad_id: int, *, packed: bool = False) -> Batch:
    """Lay documents into rows; the only place where a batch's tensors are allocated."""
    documents = [document for row in rows for document in row]
    if not documents:
        raise AlignmentError("0 sequences but at least 1 is needed to make a batch (collation). Skip empty micro-batches.")
    shape = (len(rows), max(sum(len(document) for document in row) for row in rows))
    input_ids, labels = torch.full(shape, pad_id, dtype=torch.int64), torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    mask, is_visual = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    position_ids, weights = torch.zeros(shape, dtype=torch.int64), torch.ones(shape)
    for number, row in enumerate(rows):
        start = shape[1] - sum(len(document) for document in row) if side == "left" else 0
        for document in row:
            span = slice(start, start + len(document))
            input_ids[number, span], labels[number, span] = document.input_ids, document.labels
            mask[number, span], is_visual[number, span] = True, document.is_visual
            position_ids[number, span] = torch.arange(len(document))
            weights[number, span] = document.weight
            start += len(document)
    lengths = tuple(tuple(len(document) for document in row) for row in rows) if packed else None
    visual_targets = torch.cat([document.visual_targets for document in documents])
    k = _tokens_per_image(documents)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=mask,
        position_ids=position_ids,
        is_visual=is_visual,
        pixel_values=_join_pixels(documents),
        visual_tokens=_join_visual_tokens(documents),
        from_pixels=torch.cat([document.from_pixels for document in documents]),
        visual_targets=visual_targets,
        document_lengths=lengths,
        target_weights=weights if any(document.weight != 1.0 for document in documents) else None,
        target_counts=count_targets(labels, mask, visual_targets, k, lengths),
        ids=tuple(document.id for document in documents),
        sources=tuple(document.source for document in documents),
        turns_cut=tuple(document.turns_cut for document in documents),
    )


def _tokens_per_image(documents: list[TokenSequence]) -> int:
    """The number of visual tokens that all images share; 0 without an image."""
    counts = {document.tokens_per_image: document.id for document in documents if document.num_images}
    if len(counts) > 1:
        raise AlignmentError(
            f"images of {sorted(counts)} visual tokens but one number is needed ({', '.join(counts.values())}). Use one processor."
        )
    return next(iter(counts), 0)


def _join_pixels(documents: list[TokenSequence]) -> Float[Tensor, "m 3 h w"]:
    given = [document.pixel_values for document in documents if len(document.pixel_values)]
    if len({tuple(pixels.shape[1:]) for pixels in given}) > 1:
        shapes = sorted({tuple(pixels.shape[1:]) for pixels in given})
        raise AlignmentError(f"images of shapes {shapes} but one shape is needed (collation of {documents[0].id} ...). Use one processor.")
    return torch.cat(given) if given else documents[0].pixel_values


def _join_visual_tokens(documents: list[TokenSequence]) -> Float[Tensor, "n k v"] | None:
    """Rows of tokens for all images, zero for those that come as pixels, or nothing if all do."""
    given = [document.visual_tokens for document in documents if document.visual_tokens is not None and document.num_images]
    if not given:
        return next((document.visual_tokens for document in documents if document.visual_tokens is not None), None)
    shapes = sorted({tuple(tokens.shape[1:]) for tokens in given})
    if len(shapes) > 1:
        raise AlignmentError(
            f"visual tokens of shapes {shapes} but one shape is needed (collation of {documents[0].id} ...). Use one encoder."
        )
    empty = [given[0].new_zeros((document.num_images, *shapes[0])) for document in documents]
    return torch.cat([zeros if document.visual_tokens is None or not document.num_images else document.visual_tokens
                      for document, zeros in zip(documents, empty, strict=True)])  # fmt: skip
