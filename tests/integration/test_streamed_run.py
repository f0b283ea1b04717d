"""A run whose data are streams: from a recipe, over Parquet shards with pictures, resumed, rehearsed, checked."""

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.tiny import save_parts
from typer.testing import CliRunner

from metamorph.errors import ConfigError, MediaError
from metamorph.training import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.config import StageConfig
from metamorph.training.rehearsal import rehearse
from metamorph.training.run import run
from metamorph.training.trackers import SilentTracker, read_metrics

STREAM = "metamorph.data.streamed_mixture.stream_source"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Rows whose pictures are asked about or drawn, in two shards; a broken picture in the last row."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        rows = []
        for number in range(10 * shard, 10 * shard + 10):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (12 * number, 40, 90)).save(picture, "PNG")
            data = b"no picture" if number == 19 else picture.getvalue()
            question = ("what is it? <image>", "red") if number % 2 else ("draw it", "here: <image>")
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), question, strict=True)]
            rows.append({"id": str(number), "messages": turns, "images": [{"bytes": data, "path": None}]})
        pq.write_table(pa.Table.from_pylist(rows), root / f"train-{shard}.parquet")
    return root


def settings(parts, shards, path, **data) -> RunConfig:
    source = SourceConfig(source=STREAM, kwargs={"path": str(shards), "name": "pictures", "block": 5})
    training = TrainingConfig(steps=8, batch_size=3, log_every=1, checkpoint_every=4, keep=5, precision="float32", device="cpu")
    return RunConfig(
        name="streamed",
        output_dir=str(path),
        model=ModelConfig(llm=str(parts[0]), vision=str(parts[1]), overrides={"num_visual_tokens": 4}),
        data=DataConfig(**{"sources": (source,), "order": "infinite", "max_length": 96, "on_bad_record": "skip", **data}),
        stages=(StageConfig(name="vpit", freeze=("vision_encoder",), training=training),),
    )


def train(config, *, resume=False):
    run(config, resume=resume, tracker=lambda stage: SilentTracker())
    timed = ("seconds", "data_wait_seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(config.run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("data", [{}, {"pack": True, "batch_unit": "rows", "max_length": 64}])
def test_a_run_from_a_stream_goes_on_exactly(parts, shards, tmp_path, data):
    config = settings(parts, shards, tmp_path / "run", **data)
    whole = train(config)
    assert len(whole) == 8 and whole[-1]["bad_records/pictures"] >= 1
    shutil.rmtree(config.run_dir / "checkpoints" / "vpit" / "step-00000008")
    assert train(config, resume=True) == whole
    listed = [json.loads(line) for line in (config.run_dir / "bad_records.jsonl").read_text().splitlines()]
    assert listed and all("pictures row" in one["error"] and "of epoch" in one["error"] for one in listed)


def test_a_bad_row_of_a_stream_stops_the_run_by_default(parts, shards, tmp_path):
    with pytest.raises(MediaError, match=r"pictures row \d+ of epoch 0"):
        train(settings(parts, shards, tmp_path / "run", on_bad_record="raise"))


def test_a_dry_run_and_a_check_read_the_first_rows(parts, shards, tmp_path):
    from metamorph.cli.main import app

    config = settings(parts, shards, tmp_path / "run")
    assert rehearse(config).rows["vpit"] == ["pictures: a stream; the first 3 were encoded: at most 24 positions"]
    config.save(tmp_path / "recipe.yaml")
    few = CliRunner().invoke(app, ["data", "check", "--recipe", str(tmp_path / "recipe.yaml"), "--sample", "5"])
    assert few.exit_code == 0 and "No problems in 5 rows" in few.output and "first rows of a stream" in few.output
    found = CliRunner().invoke(app, ["data", "check", "--recipe", str(tmp_path / "recipe.yaml")])
    assert found.exit_code == 1 and "image-broken: 1" in found.output
    shown = CliRunner().invoke(app, ["data", "show", "--recipe", str(tmp_path / "recipe.yaml"), "-n", "2"])
    assert shown.exit_code == 0 and "draw it" in shown.output
    refused = CliRunner().invoke(app, ["data", "encode", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "store")])
    assert isinstance(refused.exception, ConfigError) and "a stream but rows by number are needed" in str(refused.exception)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"order": "epoch"}, "order='epoch' but a stream has no number of rows"),
        ({"weight_unit": "tokens"}, "no mean_tokens but weight_unit=tokens"),
        ({"sources": None}, "drawings and a stream but their rows come either by number or in streams"),
    ],
)
def test_what_needs_rows_by_number_is_refused(parts, shards, tmp_path, changes, found):
    config = settings(parts, shards, tmp_path / "run")
    if changes.get("sources", 0) is None:
        other = SourceConfig(source="tests.drawing_examples.drawings")
        changes = {"sources": (*config.data.sources, other)}
    with pytest.raises(ConfigError, match=found):
        train(settings(parts, shards, tmp_path / "run", **changes))
