"""Visual tokens computed once: encoded over processes and interruptions, and trained on without the encoder, as with it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tests import dataset_fixtures
from tests.tiny import save_parts
from typer.testing import CliRunner

from metamorph.cli.data_encode import encode as data_encode
from metamorph.cli.main import app
from metamorph.data.broken_images import BROKEN, BrokenImages
from metamorph.data.datasets import cambrian
from metamorph.data.source import open_source
from metamorph.data.token_store import TokenStore, shard_files
from metamorph.errors import ConfigError, MediaError
from metamorph.media import image_hash
from metamorph.messages import Example, ImagePart, Message, TextPart, VideoPart
from metamorph.model.encoder_files import encoder_of_model
from metamorph.model.vision_encoder import AbsentEncoder
from metamorph.training import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainingConfig
from metamorph.training.assembly import TokenEncoder, build_model, load_source
from metamorph.training.encoding import encode_images, encoder_of, open_store, spec_of
from metamorph.training.images import image_batches
from metamorph.training.rehearsal import rehearse
from metamorph.training.run import run
from metamorph.training.stages import paper_stages
from metamorph.training.trackers import SilentTracker, read_metrics

SCRIPT = Path(__file__).with_name("encode_script.py")
PLAIN = {"precision": "float32", "log_every": 1, "device": "cpu", "batch_size": 6, "micro_batch_size": 1, "learning_rate": 3e-3}
"""With one image per forward pass of the encoder, here and where images are encoded, its sums have one order, and equal means equal."""
DRAWINGS = SourceConfig(source="tests.drawing_examples.drawings", kwargs={"colours": 6})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


def model(parts, **overrides) -> ModelConfig:
    return ModelConfig(llm=str(parts[0]), vision=str(parts[1]), overrides={"num_visual_tokens": 4, **overrides})


def encode(config, sources, directory, **options):
    files = encoder_of(config)
    return encode_images(sources, files.load(), files.processor.prepare_image, spec_of(files), directory, **{"batch_size": 1, **options})


def settings(parts, path, *, config=None, steps=(3, 5), **data) -> RunConfig:
    return RunConfig(
        name="tiny",
        output_dir=str(path),
        model=config or model(parts),
        data=DataConfig(**{"sources": (DRAWINGS,), "max_length": 128, "order": "infinite", **data}),
        stages=paper_stages(TrainingConfig(steps=steps[0], **PLAIN), TrainingConfig(steps=steps[1], **PLAIN)),
    )


def quiet(stage) -> SilentTracker:
    return SilentTracker()


def column(path, key) -> list[float]:
    return [row[key] for row in read_metrics(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A run with the encoder, to compare with."""
    path = tmp_path_factory.mktemp("with-encoder")
    run(settings(parts, path), tracker=quiet)
    return path


@pytest.mark.parametrize(("dtype", "options"), [("float32", {}), ("bfloat16", {"pack": True}), ("float32", {"workers": 1})])
def test_training_on_a_store_is_training_with_the_encoder(parts, trained, tmp_path, dtype, options):
    encode(model(parts), [load_source(DRAWINGS)], tmp_path / "store", dtype=dtype)
    seen = []

    def look(stage, model, processor):
        seen.append([name for name in model.state_dict() if name.startswith("vision_encoder.")])
        assert isinstance(model.vision_encoder.encoder, AbsentEncoder)

    result = run(settings(parts, tmp_path / "run", encoded=str(tmp_path / "store"), **options), on_stage=look, tracker=quiet)
    assert seen == [[], [], []]
    for key in ("text_loss", "visual_loss", "grad_norm"):
        found, expected = column(tmp_path / "run", key), column(trained, key)
        if dtype == "float32":
            assert found == expected  # bit for bit
        else:
            assert found == pytest.approx(expected, rel=2e-2, abs=1e-3)
            assert found != expected
    saved = encoder_of_model(result.model_dir)  # whole, although the encoder was not there
    assert saved.fingerprint() == encoder_of(model(parts)).fingerprint()
    assert not any("vision_encoder" in file.read_text() for file in result.model_dir.glob("*.index.json"))


def test_a_saved_model_goes_on_from_a_store_without_its_encoder(parts, trained, tmp_path):
    config = ModelConfig(start=str(trained / "model"))
    encode(config, [load_source(DRAWINGS)], tmp_path / "store", dtype="float32")
    for name, data in (("with", {}), ("without", {"encoded": str(tmp_path / "store")})):
        run(settings(parts, tmp_path / name, config=config, steps=(1, 2), **data), tracker=quiet)
    assert column(tmp_path / "with", "loss") == column(tmp_path / "without", "loss")
    whole = [encoder_of_model(tmp_path / name / "model").fingerprint() for name in ("with", "without")]
    assert whole[0] == whole[1]


def test_the_wrong_encoder_layer_pooling_and_number_are_refused(parts, tmp_path):
    encode(model(parts), [load_source(DRAWINGS)], tmp_path)
    right = encoder_of(model(parts)).fingerprint()
    open_store(tmp_path, model(parts))
    for name, value in {"vision_feature_layer": -2, "pooling": "area", "num_visual_tokens": 16, "image_size": (40, 40)}.items():
        other = model(parts, **{name: value})
        with pytest.raises(ConfigError, match=rf"{name}=.*{right}.*{name}=.*{encoder_of(other).fingerprint()}"):
            open_store(tmp_path, other)
    wrong, processor = build_model(model(parts), 0)
    with torch.no_grad():
        next(wrong.vision_encoder.parameters()).mul_(1.01)
    wrong.save_pretrained(tmp_path / "wrong")
    processor.save_pretrained(tmp_path / "wrong")
    config = settings(parts, tmp_path / "run", config=ModelConfig(start=str(tmp_path / "wrong")), encoded=str(tmp_path))
    for attempt in (rehearse, partial(run, tracker=quiet)):  # a dry run refuses what the run would
        with pytest.raises(ConfigError, match=rf"{right} but .*{wrong.vision_encoder.fingerprint()}: other weights"):
            attempt(config)
    (tmp_path / "index.safetensors").unlink()
    for attempt in (rehearse, partial(run, tracker=quiet)):
        with pytest.raises(ConfigError, match="no index"):
            attempt(config)


def test_an_image_that_was_not_encoded_stops_training_even_where_bad_rows_are_skipped(parts, tmp_path):
    few = SourceConfig(source=DRAWINGS.source, kwargs={"colours": 3})
    encode(model(parts), [load_source(few)], tmp_path / "store")
    with pytest.raises(ConfigError, match=r"only the 2 images .*drawing.*metamorph data encode"):
        run(settings(parts, tmp_path / "run", encoded=str(tmp_path / "store"), on_bad_record="skip"), tracker=quiet)


def asked(path: Path, names: list[str]) -> Path:
    """Rows that ask about one image each; those that are not there yet are drawn, each in a colour of its own."""
    for name in names:
        if not (path.parent / name).exists():
            Image.new("RGB", (16, 16), (int(name[0]) * 20, 90, 200)).save(path.parent / name)
    turns = ({"role": "user", "content": "<image>red?"}, {"role": "assistant", "content": "yes"})
    path.write_text("".join(json.dumps({"images": [name], "messages": turns}) + "\n" for name in names))
    return path


def test_an_image_that_encoding_found_broken_is_a_bad_row_and_one_that_nobody_encoded_is_not(parts, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(asked(tmp_path / "one.jsonl", ["0.png"]).parent / "0.png").read_bytes()[:-30])
    rows, store = asked(tmp_path / "rows.jsonl", ["0.png", "1.png", "cut.png", "3.png"]), str(tmp_path / "store")
    source = SourceConfig(source="metamorph.data.source.open_source", kwargs={"path": str(rows)})
    assert encode(model(parts), [load_source(source)], Path(store)).broken == 1
    told = {"sources": (source,), "encoded": store}
    with pytest.raises(MediaError, match=rf"does not decode .* \({rows}:3, {tmp_path}/cut\.png\)\. .*metamorph data encode"):
        run(settings(parts, tmp_path / "raise", **told), tracker=quiet)
    run(settings(parts, tmp_path / "skip", **told, on_bad_record="skip", max_bad_records=1), tracker=quiet)
    passed = [json.loads(line) for line in (tmp_path / "skip/bad_records.jsonl").read_text().splitlines()]
    assert {(one["source"], one["index"]) for one in passed} == {("rows", 2)} and "does not decode" in passed[0]["error"]
    assert column(tmp_path / "skip", "bad_records/rows")[-1] == 1
    asked(rows, ["0.png", "1.png", "cut.png", "4.png"])
    with pytest.raises(ConfigError, match=rf"4\.png .*only the 3 images .*\({rows}:4\)"):
        run(settings(parts, tmp_path / "unknown", **told, on_bad_record="skip"), tracker=quiet)


def test_broken_images_are_remembered_whatever_is_encoded_later(parts, rows, tmp_path):
    out, source = tmp_path / "out", open_source(rows, needs_answer=False)
    found = []
    for sources in ([source], [source], [load_source(DRAWINGS)]):
        encode(model(parts), sources, out, round_size=4)
        found.append((out / BROKEN).read_text())
    assert not (out / "faults.txt").exists() and found[0] == found[1] == found[2]
    cut = rows.parent / "cut.png"
    assert json.loads(found[0])["image"] == image_hash(cut).hex()  # one line, although two rows show it
    with pytest.raises(MediaError, match=r"does not decode .*\(here, .*cut\.png\)"):
        TokenStore(out).of_image(cut, "here")


def test_an_image_that_decodes_after_all_is_read(parts, rows, tmp_path):
    out, source = tmp_path / "out", open_source(rows, needs_answer=False)
    files = encoder_of(model(parts))

    def older(part):
        """A library that cannot read one of the pictures."""
        if part.image.name == "7.png":
            raise MediaError("an image that this library cannot read but another is needed (7.png). Take a later one.")
        return files.processor.prepare_image(part)

    encode_images([source], files.load(), older, spec_of(files), out)
    with pytest.raises(MediaError, match="this library cannot read"):
        TokenStore(out).of_image(rows.parent / "7.png", "here")
    assert encode(model(parts), [source], out).encoded == 1
    assert TokenStore(out).of_image(rows.parent / "7.png", "here").shape == (4, 24)
    assert image_hash(rows.parent / "7.png") in BrokenImages(out).faults  # still written down there, but the index is asked first


def test_all_stages_read_a_store_or_none_does(parts, tmp_path):
    config = settings(parts, tmp_path)
    with pytest.raises(ConfigError, match="either all stages read encoded data or none"):
        config.with_overrides({"stages.0.data": config.data.to_dict() | {"encoded": "store"}})
    with pytest.raises(ConfigError, match="encoded data need no cache"):
        settings(parts, tmp_path, encoded="store", cached_images=3)


def test_a_model_without_its_encoder_says_so(parts):
    absent, _ = build_model(model(parts), 0, with_encoder=False)
    with pytest.raises(ConfigError, match="1 images as pixels but the vision encoder was left out"):
        absent.encode_images(torch.zeros(1, 3, 32, 32))


def test_the_decoders_batches_read_the_store(parts, tmp_path):
    joined, processor = build_model(model(parts), 0)
    asked = []

    class Counting(TokenEncoder):
        def __call__(self, pixels):
            asked.append(len(pixels))
            return super().__call__(pixels)

    encode_with, pictures = Counting(joined, processor), "tests.drawing_examples.pictures"
    encode(model(parts), [load_source(SourceConfig(source=pictures))], tmp_path / "store", dtype="float32")
    make = partial(image_batches, encode_with, 3, 0, source=pictures, kwargs={}, image_size=16)
    without = make(encoded=str(tmp_path / "store"))(1)
    assert not asked
    with_encoder = make()(1)
    assert asked == [3] and without.ids == with_encoder.ids
    assert torch.equal(without.pixels, with_encoder.pixels)
    assert torch.allclose(without.tokens, with_encoder.tokens, atol=1e-6)
    other, _ = build_model(model(parts, pooling="area"), 0)
    with pytest.raises(ConfigError, match="pooling=bilinear"):
        image_batches(TokenEncoder(other, processor), 3, 0, source=pictures, kwargs={}, image_size=16, encoded=str(tmp_path / "store"))


@pytest.fixture
def rows(tmp_path):
    """14 rows: ten different pictures, two of them under two names, and four that cannot be read."""
    for number in range(10):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png")
    for number in (0, 9):
        (tmp_path / f"again-{number}.jpg").write_bytes((tmp_path / f"{number}.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "3.png").read_bytes()[:-60])
    names = [*(f"{n}.png" for n in range(10)), "again-0.jpg", "again-9.jpg", "cut.png", "none.png", "cut.png"]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "path": name}]}, {"role": "assistant", "content": "yes"}]})
        for name in names
    ]
    lines.insert(5, "{broken")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_each_image_is_encoded_once_and_broken_ones_are_named(parts, rows, tmp_path):
    rounds = []
    source = open_source(rows, needs_answer=False)
    result = encode(
        model(parts), [source], tmp_path / "out", round_size=4, batch_size=3, on_round=lambda p: rounds.append((p.done, len(p.faults)))
    )
    assert (result.rows, result.done, result.images, result.unique, result.encoded) == (16, 16, 14, 10, 10)
    assert [done for done, _ in rounds] == [4, 8, 12, 16]
    assert sorted(re.search(r"rows\.jsonl:(\d+)", fault)[1] for fault in result.faults) == ["14", "15", "16", "6"]
    assert sum("does not decode" in fault for fault in result.faults) == 2
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    store = TokenStore(tmp_path / "out")
    files = encoder_of(model(parts))
    pixels = torch.from_numpy(files.processor.prepare_image(ImagePart(rows.parent / "9.png")))
    expected = files.load()(pixels[None])[0]
    assert torch.allclose(store[image_hash(rows.parent / "again-9.jpg")], expected, atol=2**-8)
    again = encode(model(parts), [source], tmp_path / "out", round_size=4)
    assert (again.unique, again.encoded, len(again.faults)) == (10, 0, 4)


@pytest.mark.parametrize("held_bytes", [0, 3000, 2**30])
def test_images_that_came_with_their_rows_are_held_within_bounds(parts, tmp_path, held_bytes):
    """Frames of 768 bytes: of a row's six, none, some or all are kept; what is not is read again, and the store is the same."""
    reads: list[int] = []

    class Clips:
        name = "clips"

        def __len__(self):
            return 5

        def __getitem__(self, index):
            reads.append(index)
            rng = np.random.default_rng(index)
            frames = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
            clip = VideoPart(tuple(map(ImagePart, frames)), 1.0)
            turns = (Message("user", (clip, TextPart("What?"))), Message.assistant("Noise."))
            return Example(turns, str(index), self.name)

    result = encode(model(parts), [Clips()], tmp_path / "out", held_bytes=held_bytes, round_size=2, dtype="float32", threads=2)
    assert (result.images, result.unique, result.encoded, result.faults) == (30, 30, 30, [])
    assert sorted(reads) == [row for row in range(5) for _ in range(1 if held_bytes == 2**30 else 2)]
    files, store = encoder_of(model(parts)), TokenStore(tmp_path / "out")
    encoder = files.load()
    for part in (image for index in range(5) for message in Clips()[index].messages for image in message.images):
        expected = encoder(torch.from_numpy(files.processor.prepare_image(part))[None])[0]
        assert torch.equal(store[image_hash(part.image)], expected)


class Stop(Exception):
    pass


def test_what_was_encoded_before_a_stop_is_kept(parts, rows, tmp_path):
    source = open_source(rows, needs_answer=False)

    def stop(progress):
        if progress.done == 8:
            raise Stop

    with pytest.raises(Stop):
        encode(model(parts), [source], tmp_path / "out", round_size=4, on_round=stop)
    with pytest.raises(ConfigError, match="no index"):
        TokenStore(tmp_path / "out")
    assert encode(model(parts), [source], tmp_path / "out").encoded == 3  # 7 of the 10 pictures stood in the first 8 rows
    assert len(TokenStore(tmp_path / "out")) == 10


@pytest.fixture
def command():
    """`metamorph data encode`, alone."""
    alone = typer.Typer()
    alone.command()(data_encode)
    return lambda *arguments: CliRunner().invoke(alone, [str(argument) for argument in arguments])


@pytest.fixture
def saved(parts, tmp_path):
    joined, processor = build_model(model(parts), 0)
    for part in (joined, processor):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_names_what_is_broken_and_encodes_the_rest(command, rows, saved, tmp_path):
    out = tmp_path / "out"
    result = command(rows, "--model", saved, "--out", out, "--batch-size", 3, "--device", "cpu")
    assert result.exit_code == 1, result.output
    for place, words in [
        ("rows.jsonl:14", "does not decode"),
        ("rows.jsonl:15", "none.png"),
        ("rows.jsonl:16", ""),
        ("rows.jsonl:6", "JSON"),
    ]:
        assert any(place in line and words in line for line in result.output.splitlines()), (place, result.output)
    assert "16 of 16 rows, 14 images" in result.output and "4 broken" in result.output
    assert "4 visual tokens of width 24 per image" in result.output and f"--set data.encoded={out}" in result.output
    faults = (out / "faults.txt").read_text().splitlines()
    assert all(fault in result.output for fault in faults)
    cut, none = (str(rows.parent / name) for name in ("cut.png", "none.png"))
    expected = [
        f"{rows}:6: ",
        rf"{rows}:14 image 1: an image that does not decode \(.*\) in '{cut}' but a whole file is needed\. Fetch it again\.",
        rf"{rows}:15 image 1: a file that cannot be read \(.*\) in '{none}' but an image is needed\.",
        rf"{rows}:16 image 1: an image that does not decode",
    ]
    assert len(faults) == 4 and all(any(re.match(line, fault) for fault in faults) for line in expected), faults
    assert len(TokenStore(out)) == 10
    again = command(rows, "--model", saved, "--out", out, "--dtype", "float32")
    assert isinstance(again.exception, ConfigError) and "a store of bfloat16 but float32" in str(again.exception)


def test_a_malformed_row_is_named_as_data_check_names_it(command, saved, tmp_path):
    good, bad = ({"messages": [{"role": role, "content": "hello"} for role in roles]} for roles in (("user", "assistant"), ("user", "gtp")))
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    checked = CliRunner().invoke(app, ["data", "check", str(file)])
    result = command(file, "--model", saved, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    (fault,) = (tmp_path / "out/faults.txt").read_text().splitlines()
    assert fault.startswith(f"{file}:2 messages[1].role: ")
    assert fault in checked.output and fault in result.output


def test_a_bad_row_of_a_published_data_set_is_named_by_its_file(parts, tmp_path):
    path = dataset_fixtures.cambrian(tmp_path) / cambrian.RECORDS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | ({"conversations": None} if number == 1 else {})) + "\n" for number, row in enumerate(rows)))
    result = encode(model(parts), [cambrian.source(str(tmp_path))], tmp_path / "out")
    (fault,) = (tmp_path / "out/faults.txt").read_text().splitlines()
    assert fault.startswith(f"{path}:2 conversations: ") and result.encoded > 0


def test_the_command_takes_a_recipes_encoder_and_sources(command, parts, tmp_path):
    settings(parts, tmp_path / "run").save(tmp_path / "recipe.yaml")
    result = command("--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--device", "cpu", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out/faults.txt").exists()
    assert len(open_store(tmp_path / "out", model(parts))) == 4  # six colours, of which two are in rows without pictures
    for arguments, words in [
        (("rows.jsonl", "--out", tmp_path / "x"), "no model but --model"),
        (("--model", "m"), "no files but some"),
        (("--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "x", "--dtype", "int8"), "'int8' but bfloat16 or float32"),
    ]:
        refused = command(*arguments)
        assert isinstance(refused.exception, ConfigError) and words in str(refused.exception), refused.exception


def test_an_interrupted_command_says_how_to_go_on(command, rows, saved, tmp_path, monkeypatch):
    def interrupt(progress):
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun ends its processes

    @contextmanager
    def shown(console):
        yield interrupt

    monkeypatch.setattr("metamorph.cli.data_encode._shown", shown)
    result = command(rows, "--model", saved, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 130
    assert f"kept in {tmp_path / 'out'}" in result.output and "The same command goes on: metamorph" in result.output
    assert shard_files(tmp_path / "out")


def launch(parts, rows, out, number: int, slow: float = 0.0) -> subprocess.Popen:
    command = [sys.executable]
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [str(SCRIPT), *map(str, parts), str(rows), str(out), str(slow)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_encode_each_image_once_and_alike(parts, rows, tmp_path):
    outputs = {}
    for number in (1, 2):
        process = launch(parts, rows, tmp_path / f"out{number}", number)
        outputs[number], errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    assert "total 16 14 10 10 4" in outputs[1] and "total 16 14 10 10 4" in outputs[2]
    shares = [int(share) for share in re.findall(r"rank \d encoded (\d+)", outputs[2])]
    assert sum(shares) == 10 and min(shares) >= 3
    one, two = (TokenStore(tmp_path / f"out{number}") for number in (1, 2))
    assert len(one) == len(two) == 10
    for number in range(10):
        key = image_hash(rows.parent / f"{number}.png")
        assert torch.allclose(one[key], two[key], atol=1e-6)
    written = [(tmp_path / f"out{number}" / BROKEN).read_text() for number in (1, 2)]
    assert written[0] == written[1] and len(written[1].splitlines()) == 1  # one process writes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_job_goes_on_with_another_number_of_processes(parts, rows, tmp_path):
    out = tmp_path / "out"
    process = launch(parts, rows, out, 1, slow=0.5)
    until = time.monotonic() + 120
    while len(shard_files(out)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(shard_files(out))
    assert 2 <= before < 5
    shard_files(out)[0].write_bytes(b"cut short")
    later = launch(parts, rows, out, 2)
    output, errors = later.communicate(timeout=240)
    assert later.returncode == 0, errors[-3000:]
    assert 10 - 2 * before <= int(re.search(r"total 16 14 10 (\d+) 4", output)[1]) < 10
    assert len(TokenStore(out)) == 10
