"""The command's frame: refusals are one line, bugs keep their traceback, nouns register themselves."""

import importlib

import pytest
import typer
from typer.testing import CliRunner

import metamorph
from metamorph.cli import main as command
from metamorph.errors import ConfigError


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
