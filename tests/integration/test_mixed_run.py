"""Runs on several sources, of text, images read and images drawn: losses by source, packed rows, skipped rows, one process and two."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import save_parts

from metamorph.errors import ConfigError, RecordError
from metamorph.training import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.assembly import build_encoder, build_mixture, build_model
from metamorph.training.config import StageConfig
from metamorph.training.run import run
from metamorph.training.trackers import SilentTracker, read_metrics

ROOT = Path(__file__).parents[2]
ROWS = {"pack": True, "batch_unit": "rows", "max_length": 96}
SKIP = {"on_bad_record": "skip", "max_bad_records": 20}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


def source(kind, broken_every=0, **settings):
    return SourceConfig(source="tests.drawing_examples.one_kind", kwargs={"kind": kind, "broken_every": broken_every}, **settings)


def settings(parts, path, *, data=None, broken_every=0, **training) -> RunConfig:
    plain = {"steps": 6, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-3, "log_every": 1, "checkpoint_every": 3, "keep": 5}
    sources = tuple(source(kind, broken_every, loss_weight=1 + number) for number, kind in enumerate(("talk", "read", "draw")))
    stage = StageConfig(
        name="vpit",
        freeze=("vision_encoder",),
        training=TrainingConfig(**{**plain, "precision": "float32", "device": "cpu", **training}),
    )
    return RunConfig(
        name="mixed",
        output_dir=str(path),
        model=ModelConfig(llm=str(parts[0]), vision=str(parts[1]), overrides={"num_visual_tokens": 4}),
        data=DataConfig(**{"sources": sources, "max_length": 96, **(data or {})}),
        stages=(stage,),
    )


def train(config, *, resume=False):
    run(config, resume=resume, tracker=lambda stage: SilentTracker())
    return rows(config)


def rows(config):
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(config.run_dir / "metrics.jsonl")]


def recombined(row, kind):
    """The mean over all targets, from the means of the sources."""
    counts = {key.rpartition("/")[2]: value for key, value in row.items() if key.startswith(f"targets/{kind}/")}
    return sum(row[f"loss/{kind}/{name}"] * count for name, count in counts.items()) / sum(counts.values())


@pytest.mark.parametrize("data", [{}, {"pack": True}, ROWS])
def test_losses_by_source_make_up_the_loss(parts, tmp_path, data):
    logged = train(settings(parts, tmp_path, data=data, micro_batch_size=2))
    assert len(logged) == 6
    for row in logged:
        assert recombined(row, "text") == pytest.approx(row["text_loss"], rel=1e-5)
        if row["visual_loss"] is not None:
            assert recombined(row, "visual") == pytest.approx(row["visual_loss"], rel=1e-5)
    assert {key for row in logged for key in row if key.startswith("loss/visual")} == {"loss/visual/draw"}
    assert {key for row in logged for key in row if key.startswith("loss/text")} == {
        f"loss/text/{kind}" for kind in ("talk", "read", "draw")
    }


@pytest.mark.parametrize("data", [{}, ROWS])
def test_skipped_rows_are_listed_counted_and_limited(parts, tmp_path, data):
    config = settings(parts, tmp_path / "run", data={**SKIP, **data}, broken_every=4)
    logged = train(config)
    listed = [json.loads(line) for line in (config.run_dir / "bad_records.jsonl").read_text().splitlines()]
    assert listed and all(f"{one['source']}.jsonl:{one['index'] + 1}" in one["error"] for one in listed)
    assert sum(value for key, value in logged[-1].items() if key.startswith("bad_records/")) == len(listed)
    with pytest.raises(RecordError, match=r"2 bad rows \(.*but at most 1 may be skipped .*bad_records.jsonl"):
        train(settings(parts, tmp_path / "limited", data={**SKIP, **data, "max_bad_records": 1}, broken_every=4))
    with pytest.raises(RecordError, match="a broken row"):
        train(settings(parts, tmp_path / "raise", data=data, broken_every=4))


def test_rows_that_lost_turns_are_counted_by_source(parts, tmp_path):
    """One epoch, logged every other step: what is counted between is not lost."""
    data = {"sources": (source("chat"),), "max_length": 60, "too_long": "cut_turns"}
    config = settings(parts, tmp_path, data=data, steps=10, log_every=2, checkpoint_every=10)
    mixture = build_mixture(config.data, 0)
    encode = build_encoder(config.data, build_model(config.model, 0)[1])
    long = [index for index in range(40) if encode(mixture.sources[0].source[index]).turns_cut]
    counted = [key for row in train(config) for key, value in row.items() if key.startswith("shortened_rows/") for _ in range(value)]
    assert 5 < len(long) < 35 and counted == ["shortened_rows/chat"] * len(long)


def cut_back(config):
    """As if the run had died after its third step."""
    shutil.rmtree(config.run_dir / "checkpoints" / "vpit" / "step-00000006")


def test_packed_rows_and_skipped_ones_resume_exactly(parts, tmp_path):
    config = settings(parts, tmp_path, data={**SKIP, **ROWS}, broken_every=4)
    whole = train(config)
    listed = (tmp_path / "bad_records.jsonl").read_text()
    cut_back(config)
    assert train(config, resume=True) == whole
    assert (tmp_path / "bad_records.jsonl").read_text() == listed


def test_weights_may_be_shares_of_tokens(parts):
    from metamorph.data.example_encoder import ExampleEncoder
    from metamorph.model.conversion import initialize

    _, processor = initialize(*map(str, parts), seed=0, num_visual_tokens=4)
    encode = ExampleEncoder(processor, 200)
    sources = (source("talk", weight=2.0), source("draw", weight=1.0))
    data = DataConfig(sources=sources, order="infinite", weight_unit="tokens", token_sample=40)
    mixture = build_mixture(data, 0, encode)
    tokens = {0: 0, 1: 0}
    for draw in mixture.draw(2000):
        tokens[draw.source] += len(encode(mixture.example(draw)))
    assert tokens[0] / tokens[1] == pytest.approx(2, rel=0.1)
    with pytest.raises(ConfigError, match="no mean_tokens"):
        build_mixture(data, 0)
    stated = data.model_copy(update={"sources": (source("talk", mean_tokens=10), source("draw", mean_tokens=40))})
    assert [entry.weight for entry in build_mixture(stated, 0).sources] == [0.1, 0.025]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sources": (source("talk", weight=2),)}, "weight=2 for .* use repeats"),
        ({"order": "infinite", "sources": (source("talk", repeats=2),)}, "repeats=2 for .* use weight"),
        ({"weight_unit": "tokens"}, "epochs have no weights"),
        ({"sources": (source("talk", mean_tokens=5),)}, "mean_tokens=5 .* shares of examples"),
        ({"batch_unit": "rows"}, "packed rows need pack: true"),
        ({"batch_unit": "rows", "pack": True, "group_by_length": True}, "are not grouped"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, found):
    with pytest.raises(ConfigError, match=found):
        DataConfig(**{"sources": (source("talk"),), **changes})


def test_packed_rows_need_a_number_of_steps(parts, tmp_path):
    with pytest.raises(ConfigError, match="how many packed rows an epoch fills is not known"):
        settings(parts, tmp_path, data=ROWS, steps=0)


def launch(config, resume="new") -> None:
    """Train on two processes."""
    path = config.run_dir.with_suffix(".yaml")
    config.save(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [str(Path(__file__).with_name("mixed_script.py")), str(path), resume]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_read_any_mixture_as_one_does(parts, tmp_path):
    """Two rows a process and one a pass: text alone here and pictures there, in all compositions; some rows broken."""
    options = {"data": SKIP, "broken_every": 4, "steps": 12, "batch_size": 4}
    one, two = (settings(parts, tmp_path / name, **options) for name in ("one", "two"))
    train(one)
    launch(two)
    alone, together = rows(one), rows(two)
    keys = {key for row in alone for key in row if key.startswith(("loss", "text_loss", "targets", "bad_records"))}
    assert len(together) == 12 and {"loss/visual/draw", "bad_records/talk"} <= keys
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        assert [b[key] for key in sorted(keys & a.keys())] == pytest.approx([a[key] for key in sorted(keys & a.keys())], rel=1e-3)
    files = [sorted((config.run_dir / "bad_records.jsonl").read_text().splitlines()) for config in (one, two)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_on_packed_rows_of_their_own(parts, tmp_path):
    config = settings(parts, tmp_path / "run", data={**SKIP, **ROWS}, broken_every=4, batch_size=4)
    launch(config)
    whole = rows(config)
    assert len(whole) == 6 and all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in whole)
    cut_back(config)
    launch(config, "resume")
    assert rows(config) == whole  # bit for bit, each process going on with its own rows
