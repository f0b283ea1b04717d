"""Padding and packing: nothing lost, nothing overlapping, everything comes out as it went in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sequences import same, sequence

from metamorph.batch import IGNORE_INDEX
from metamorph.data.collate import first_fit, pack, pad, unpack
from metamorph.errors import AlignmentError, ContextLengthError

shapes = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.lists(st.sampled_from(["pixels", "tokens", "drawn"]), max_size=3),
        st.integers(0, 4),
        st.sampled_from([1.0, 0.5]),
    ),
    min_size=1,
    max_size=7,
)


def build(drawn):
    return [sequence(i, before=b, images=tuple(images), after=a, weight=w) for i, (b, images, a, w) in enumerate(drawn)]


def expected_counts(sequences):
    return {"text": sum(s.num_text_targets for s in sequences), "visual": sum(s.num_visual_targets for s in sequences)}


@given(shapes, st.sampled_from(["left", "right"]))
def test_padding_keeps_every_sequence(drawn, side):
    sequences = build(drawn)
    batch = pad(sequences, side=side, pad_id=9)
    assert all(same(a, b) for a, b in zip(sequences, unpack(batch), strict=True))
    assert batch.input_ids.shape == (len(sequences), max(map(len, sequences)))
    assert (batch.input_ids[~batch.attention_mask] == 9).all()
    assert (batch.labels[~batch.attention_mask] == IGNORE_INDEX).all()
    assert not batch.is_visual[~batch.attention_mask].any()
    for row, length in enumerate(map(len, sequences)):
        assert batch.position_ids[row][batch.attention_mask[row]].tolist() == list(range(length))
    assert batch.target_counts == expected_counts(sequences)
    assert batch.document_lengths is None


@given(shapes, st.integers(0, 30))
def test_packing_keeps_every_sequence(drawn, spare):
    sequences = build(drawn)
    longest = max(map(len, sequences))
    batch = pack(sequences, longest + spare)
    out = unpack(batch)
    assert sorted(s.id for s in out) == sorted(s.id for s in sequences)
    by_id = {s.id: s for s in sequences}
    assert all(same(by_id[s.id], s) for s in out)
    assert batch.input_ids.shape[1] <= longest + spare
    assert batch.document_lengths is not None
    for row, lengths in enumerate(batch.document_lengths):
        assert batch.attention_mask[row].sum() == sum(lengths)
        assert batch.position_ids[row][: sum(lengths)].tolist() == [i for n in lengths for i in range(n)]
    assert batch.ids == tuple(s.id for s in out)
    assert batch.target_counts == expected_counts(sequences) == pad(sequences).target_counts


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_first_fit_is_a_partition_into_rows_with_room(lengths, max_length):
    rows = first_fit(lengths, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= max_length for total in sums)
    for later, row in enumerate(rows):  # the first item of a row fitted into no earlier one, as filled then
        for earlier in range(later):
            filled = sum(lengths[i] for i in rows[earlier] if i < row[0])
            assert filled + lengths[row[0]] > max_length


def test_images_stay_in_reading_order_when_rows_are_reordered():
    long, short, tail = sequence(0, before=8), sequence(1, before=1, images=("drawn",)), sequence(2, before=1, images=("pixels",), after=1)
    batch = pack([sequence(3, before=9, images=("pixels",)), long, short, tail], 17)
    assert batch.ids == ("s3", "s0", "s1", "s2") or len(batch.ids) == 4
    order = [int(value) // 1000 for value in batch.pixel_values[:, 0, 0, 0]]
    assert order == [int(name[1:]) + 1 for name in batch.ids if name != "s0"]


def test_a_long_sequence_is_refused_not_cut():
    long = sequence(7, before=20, images=("drawn", "pixels"))
    for collate in (lambda: pad([long], max_length=29), lambda: pack([sequence(0), long], 29)):
        with pytest.raises(ContextLengthError, match=r"30 positions with 2 images x 2 visual tokens but at most 29 fit \(s7\)"):
            collate()
    assert len(pack([long], 30)) == 1


def test_weights_mark_every_position_of_their_sequence():
    batch = pack([sequence(0), sequence(1, weight=0.5)], 8)
    assert batch.target_weights.tolist() == [[1.0] * 4 + [0.5] * 4]
    assert pad([sequence(0)]).target_weights is None


def test_tokens_and_pixels_in_one_batch():
    batch = pad([sequence(0, images=("pixels",)), sequence(1, images=("tokens", "drawn")), sequence(2)])
    assert batch.from_pixels.tolist() == [True, False, True]
    assert batch.visual_tokens.shape == (3, 2, 3)
    assert batch.visual_tokens[0].abs().sum() == 0
    assert batch.visual_tokens[1, 0, 0] == -2000
    assert len(batch.pixel_values) == 2
    assert pad([sequence(0, images=("pixels",))]).visual_tokens is None


def test_a_batch_without_images_has_empty_image_tensors():
    batch = pad([sequence(0), sequence(1)])
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.target_counts == {"text": 4, "visual": 0}


@pytest.mark.parametrize(
    ("sequences", "found"),
    [
        ([], "0 sequences"),
        ([{"images": ("pixels",), "k": 2}, {"images": ("pixels",), "k": 3}], r"images of \[2, 3\] visual tokens"),
        ([{"images": ("pixels",), "side": 4}, {"images": ("pixels",), "side": 6}], r"\(3, 4, 4\), \(3, 6, 6\)"),
        ([{"images": ("tokens",), "width": 3}, {"images": ("tokens",), "width": 5}], r"\(2, 3\), \(2, 5\)"),
    ],
)
def test_sequences_that_do_not_fit_together_are_refused(sequences, found):
    with pytest.raises(AlignmentError, match=found):
        pad([sequence(i, **options) for i, options in enumerate(sequences)])


@given(shapes, st.integers(1, 4))
def test_a_packed_batch_can_be_split_into_rows(drawn, parts):
    sequences = build(drawn)
    batch = pack(sequences, max(map(len, sequences)) + 10)
    pieces = batch.split_into(parts)
    again = [s for piece in pieces for s in unpack(piece)]
    assert all(same(a, b) for a, b in zip(unpack(batch), again, strict=True))
    assert sum(piece.target_counts["visual"] for piece in pieces) == batch.target_counts["visual"]
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), batch.input_ids)
