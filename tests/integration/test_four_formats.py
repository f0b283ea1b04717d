"""One dataset in four formats: the same messages, pixel by pixel, and the same training, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_parts

from metamorph.data.faults import Fault
from metamorph.data.source import open_source
from metamorph.data.writing import LAYOUTS
from metamorph.media import open_image
from metamorph.messages import Example, ImagePart, Part, TextPart
from metamorph.microworld.examples import MIXTURE
from metamorph.microworld.export import export, rows_to_export
from metamorph.training import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.config import StageConfig
from metamorph.training.run import run
from metamorph.training.trackers import SilentTracker, read_metrics

ROWS = 60


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    for layout in LAYOUTS:
        export(rows_to_export(ROWS), layout, root / layout)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    return save_parts(tmp_path_factory.mktemp("parts"), context=1024)


def plain(part: Part) -> Any:
    """A part by value: the text, or the pixels."""
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, ImagePart):
        assert part.image is not None
        image = open_image(part.image)
        return image.size, image.tobytes()
    return [plain(frame) for frame in part.frames], part.fps


def by_value(example: Example) -> tuple:
    said = [(message.role, [plain(part) for part in message.parts]) for message in example.messages]
    return example.id, example.source, example.kind, example.weight, said


def source_in(folder: Path) -> SourceConfig:
    return SourceConfig(source="metamorph.data.source.open_source", kwargs={"path": str(folder), "name": "microworld"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_formats_hold_the_same_messages(exported, layout):
    original, source = rows_to_export(ROWS), open_source(exported[layout])
    assert {original[index].kind for index in range(ROWS)} == set(MIXTURE), "too few rows to tell"
    assert len(source) == ROWS
    assert [by_value(source[index]) for index in range(ROWS)] == [by_value(original[index]) for index in range(ROWS)]
    found: list[Fault] = list(source.rows.faults())
    for index in range(ROWS):
        source.examine(index, found.append)
    assert not found, "false alarm"


def test_all_formats_give_the_same_training(exported, parts, tmp_path):
    """Order, lengths, pixels, targets: if anything differed, some digit of some loss would."""
    sources = {layout: source_in(exported[layout]) for layout in LAYOUTS}
    sources["microworld"] = SourceConfig(source="metamorph.microworld.examples.training_source", kwargs={"size": ROWS})
    losses = {}
    for name, source in sources.items():
        training = TrainingConfig(steps=5, batch_size=4, precision="float32", device="cpu", log_every=1)
        settings = RunConfig(
            name=name,
            output_dir=str(tmp_path / name),
            model=ModelConfig(llm=str(parts[0]), vision=str(parts[1]), overrides={"num_visual_tokens": 4}),
            data=DataConfig(sources=(source,), max_length=1024),
            stages=(StageConfig(name="vpit", freeze=("vision_encoder",), training=training),),
        )
        run(settings, tracker=lambda stage: SilentTracker())
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [{key: value for key, value in row.items() if key.endswith("loss") or key == "step"} for row in rows]
    assert [row["step"] for row in losses["microworld"]] == [1, 2, 3, 4, 5]
    assert all(row["text_loss"] and row["visual_loss"] for row in losses["microworld"])
    for layout in LAYOUTS:
        assert losses[layout] == losses["microworld"], layout
