"""Places, devices: what a mistyped one is answered with, at once and with the nearest that exists."""

import socket

import pytest
import torch

from metamorph.device import devices, find_device
from metamorph.errors import CheckpointError, ConfigError
from metamorph.places import check_source, check_target, looks_local


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder to work in, with one finished run, and no way to the hub."""
    (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("runs/frist/model", "Did you mean runs/first/model"),
        ("./runs/first/modle", "Did you mean runs/first/model"),
        ("runs/frist", "Did you mean runs/first"),
        ("./start", "holds runs"),
        ("/nowhere-at-all/model", "Give a directory that exists"),
        ("~/nowhere-at-all", "Give a directory that exists"),
        ("a/b/c", "a name on the hub"),
        (r"C:\models\first", "Give a directory that exists"),
    ],
)
def test_a_mistyped_path_is_refused_with_the_nearest(runs, reference, said):
    with pytest.raises(CheckpointError) as refused:
        check_source(reference, "a model", index="config.json")
    assert str(refused.value).startswith(f"no such directory but a model was expected ({reference}). ")
    assert said in str(refused.value)


def test_names_on_the_hub_pass_and_are_not_expected_where_a_directory_is_needed(runs):
    for name in ("gpt2", "google/siglip2-base-patch16-224"):
        assert not looks_local(name)
        check_source(name, "a model")
        with pytest.raises(CheckpointError, match="no such directory"):
            check_source(name, "a model", hub=False)


def test_a_name_without_an_owner_is_no_model_of_ours(runs):
    check_source("me/first", "a MetaMorph checkpoint", owned=True)
    with pytest.raises(CheckpointError, match=r"no such directory but a MetaMorph checkpoint was expected \(frist\).*owner/name"):
        check_source("frist", "a MetaMorph checkpoint", owned=True)


def test_a_name_on_the_hub_that_was_fetched_passes_whatever_directories_there_are(runs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "/cache/config.json")
    check_source("runs/first-of-the-hub", "a model", index="config.json")


def test_a_runs_directory_names_the_model_inside(runs):
    check_source("runs/first/model", "a model", index="config.json")
    with pytest.raises(CheckpointError, match=r"the directory of a run but a model was expected \(runs/first\)\. Give runs/first/model"):
        check_source("runs/first", "a model", index="config.json")
    with pytest.raises(CheckpointError, match=r"a file but the directory of a model was expected \(runs/notes\.txt\)\. Give runs\."):
        check_source("runs/notes.txt", "a model")


def test_loaders_refuse_a_mistyped_path_without_the_hub(runs):
    from metamorph.decoder import VisualDecoderPipeline
    from metamorph.decoder.parts import load_parts
    from metamorph.model import MetaMorph, MetaMorphProcessor
    from metamorph.model.conversion import load_language_model
    from metamorph.model.vision_encoder import load_vision_model

    loaders = (MetaMorph.from_pretrained, MetaMorphProcessor.from_pretrained, VisualDecoderPipeline.from_pretrained)
    for load in (*loaders, load_parts, load_language_model, load_vision_model):
        with pytest.raises(CheckpointError, match="Did you mean runs/first/model"):
            load("runs/frist/model")
    with pytest.raises(CheckpointError, match="but a whole decoder was expected"):
        VisualDecoderPipeline.from_pretrained("runs/first")


@pytest.mark.parametrize("directory", [True, False])
def test_a_place_that_can_be_written_passes_and_nothing_is_made(tmp_path, directory):
    check_target(tmp_path / "new" / "deep" / "out.json", "--out", directory=directory)
    assert list(tmp_path.iterdir()) == []
    if not directory:
        (tmp_path / "there.json").write_text("mine")
        check_target(tmp_path / "there.json", "--out")
        assert (tmp_path / "there.json").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, directory, said in (
        (tmp_path / "file" / "out.json", False, "a file at"),
        (tmp_path / "file", True, "a file at"),
        (tmp_path / "file" / "deep" / "out", True, "a file at"),
        (tmp_path, False, "a directory but a file name"),
    ):
        with pytest.raises(ConfigError, match=rf"{said} .*\(--out {path}\)\. "):
            check_target(path, "--out", directory=directory)

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)  # the tests may run as somebody who may write anywhere
    with pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\) but a directory is to be written there"):
        check_target(tmp_path / "new", "--out", directory=True)


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type == devices()[0]
    for wanted in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ConfigError, match=rf"device '{wanted}' asked for but this machine has .*cpu.* Give one of these"):
            find_device(wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"device 'cuda:2' asked for but this machine has cuda \(0 to 1\)"):
        find_device("cuda:2")
