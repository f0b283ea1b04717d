"""What a model reads, told position by position."""

from tests.sequences import sequence

from metamorph.batch import TokenSequence
from metamorph.data.inspection import as_table, describe, runs, target_texts


def decode(ids):
    return "".join(f"<{number}>" if number < 10 else f"{number}." for number in ids)


def test_every_position_is_described():
    described = sequence(0, before=2, images=("tokens", "drawn"), after=1)
    rows = describe(described, decode)
    assert [row.position for row in rows] == list(range(len(described)))
    assert [row.token_id for row in rows] == described.input_ids.tolist()
    assert [row.kind for row in rows] == ["text"] * 3 + ["visual"] * 2 + ["text"] * 2 + ["visual"] * 2 + ["text"] * 2
    assert [row.image for row in rows if row.kind == "visual"] == [0, 0, 1, 1]
    assert [row.from_pixels for row in rows if row.kind == "visual"] == [False, False, True, True]
    targets = [row.position for row in rows if row.is_target]
    assert len(targets) == described.num_text_targets + described.num_visual_targets == 3
    assert rows[-1].label == rows[-1].token_id


def test_runs_cover_the_sequence_and_name_the_images():
    described = sequence(0, before=2, images=("pixels", "drawn"), after=2)
    pieces = runs(described, decode)
    assert sum(run.length for run in pieces) == len(described)
    assert [run.start for run in pieces] == [0, 3, 5, 7, 9, 10]
    assert target_texts(described, decode) == ["[image 1: 2 visual tokens]", "1010.1011."]
    assert as_table(pieces)[1] == {"position": 3, "length": 2, "kind": "visual", "target": "", "text": "[image 0: 2 visual tokens]"}


def test_the_first_position_is_no_target_since_nothing_predicts_it():
    described = sequence(0, before=0, after=3)
    assert [row.is_target for row in describe(described, decode)] == [False, True, True]
    assert isinstance(described, TokenSequence)
