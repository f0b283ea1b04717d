"""The command's frame: refusals are one line, bugs keep their traceback, nouns register themselves."""

import importlib
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import metamorph
from metamorph.cli import main as command
from metamorph.errors import CheckpointError, ConfigError, HubError


@pytest.fixture
def failing(monkeypatch):
    """Replaces the command by one that raises what the test asks for."""

    def install(error: Exception) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(command, "app", app)
        monkeypatch.setattr("sys.argv", ["metamorph"])

    return install


def test_version():
    result = CliRunner().invoke(command.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"metamorph {metamorph.__version__}\n")


def test_refusal_is_one_line_and_exit_code_2(failing, capsys):
    failing(ConfigError("recipe 'microwolrd' but one of a, b is expected. Did you mean 'a'?"))
    with pytest.raises(SystemExit) as leaving:
        command.main()
    assert leaving.value.code == command.EXIT_REFUSED == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "ConfigError: recipe 'microwolrd' but one of a, b is expected. Did you mean 'a'?\n"


def test_a_bug_keeps_its_traceback(failing):
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        command.main()


def test_without_arguments_the_help_is_shown():
    result = CliRunner().invoke(command.app, [])
    assert "Usage:" in result.output


@pytest.mark.parametrize("noun", command.NOUNS)
def test_every_noun_is_a_subcommand_with_help(noun: str):
    assert callable(importlib.import_module(f"metamorph.cli.{noun}").register)
    result = CliRunner().invoke(command.app, [noun, "--help"])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) > 3


OUTPUTS = {
    "generate": ["a star", "-o"],
    "evaluate": ["-o"],
    "doctor": ["--json"],
    "init": ["--llm", "missing", "--vision", "missing", "--out"],
    "convert": ["--from-official", "missing", "--out"],
    "train": ["microworld", "--output-dir"],
}


@pytest.mark.parametrize("noun", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(noun, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # whatever loads a model fails otherwise
    target = tmp_path / "file" / "out.png"
    for more in [[], ["--dry-run"]] if noun == "train" else [[]]:
        refused = CliRunner().invoke(command.app, [noun, *OUTPUTS[noun], str(target), *more]).exception
        assert isinstance(refused, ConfigError), refused
        assert f"a file at {tmp_path / 'file'} but a directory is needed there" in str(refused)


@pytest.mark.parametrize("noun", ["generate", "chat", "evaluate"])
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            ["--decoder", "runs/mistyped/decoder"],
            CheckpointError,
            r"no such directory but a decoder was expected \(runs/mistyped/decoder\)",
        ),
        (["--model", "runs/mistyped/model"], CheckpointError, "no such directory but a MetaMorph checkpoint was expected"),
        (["--device", "gpu"], ConfigError, "device 'gpu' asked for but this machine has"),
    ],
)
def test_what_a_user_mistypes_is_refused_in_one_line(noun, options, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = ["What?"] if noun == "generate" else []
    refused = CliRunner().invoke(command.app, [noun, *question, *options])
    assert isinstance(refused.exception, error), refused.output
    with pytest.raises(error, match=said):
        raise refused.exception


def test_a_push_without_a_network_or_under_an_impossible_name_is_refused(tmp_path):
    from tests.tiny import save_parts

    from metamorph.model.conversion import initialize

    model, processor = initialize(*save_parts(tmp_path), num_visual_tokens=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name, error, said in (("me/star", HubError, "Unset HF_HUB_OFFLINE"), ("me/my/star", ConfigError, "user/name")):
        refused = CliRunner().invoke(command.app, ["push", str(tmp_path / "model"), name]).exception
        assert isinstance(refused, error) and name in str(refused) and said in str(refused)


def test_a_mistyped_recipe_gets_the_one_message(tmp_path):
    """From the outside, in a process of its own: nothing else may be said on the way out."""
    code = "import sys; sys.argv = ['metamorph', 'train', 'microwrld']; from metamorph.cli.main import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "ConfigError: 'microwrld' but that is no recipe. Did you mean 'microworld'? (metamorph train)\n"


def test_init_shows_no_bars_of_other_libraries(tmp_path):
    from metamorph.microworld.components import shipped

    parts = ["--llm", str(shipped("llm")), "--vision", str(shipped("encoder")), "--num-visual-tokens", "16"]
    code = f"import sys; sys.argv = {['metamorph', 'init', *parts, '--out', str(tmp_path / 'out')]}"
    code += "; from metamorph.cli.main import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "projector" in ended.stdout and (tmp_path / "out" / "model.safetensors").is_file()
