"""The examples of docs/data-formats.md are records of the formats under whose headings they stand, and have no fault."""

import json
import re
from pathlib import Path

import pytest
from tests.docs.pages import DOCS

from metamorph.data.faults import Fault, Report
from metamorph.data.record_fields import detect
from metamorph.data.records import RecordSettings, to_example
from metamorph.data.references import Roots
from metamorph.data.rows import RawRow
from metamorph.messages import ImagePart, VideoPart

FORMATS = {
    "LLaVA": "llava",
    "Messages": "messages",
    "Messages with parts": "messages",
    "Ours": "metamorph",
    "Questions": "qa",
    "Pairs": "pairs",
}


def examples() -> list:
    sections = re.split(r"^## (.+)$", (DOCS / "data-formats.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [
        pytest.param(heading, json.loads(block), id=f"{heading}-{number}")
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
        for number, block in enumerate(re.findall(r"^```json\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    ]


@pytest.mark.parametrize(("heading", "record"), examples())
def test_an_example_is_read_as_its_heading_says(heading: str, record: dict, tmp_path: Path):
    def open_video(path: Path | bytes, warn: Report) -> VideoPart:
        return VideoPart((ImagePart(b"a frame"),), 1.0)

    faults: list[Fault] = []
    settings = RecordSettings(roots=Roots(tmp_path), open_video=open_video)
    assert detect(record) == FORMATS[heading]
    assert to_example(RawRow(record, "here"), settings, faults.append) is not None
    assert not faults


def test_every_format_has_an_example():
    assert {param.values[0] for param in examples()} == set(FORMATS)
