"""`metamorph doctor` in real situations: libraries missing, too old or broken, weights damaged, threads too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metamorph.cli import checkup
from metamorph.cli.checkup import GENERATE, Finding, works
from metamorph.cli.doctor import show
from metamorph.cli.main import app
from metamorph.errors import ComponentError


def named(findings, name: str) -> Finding:
    (found,) = [one for one in findings if one.name == name]
    return found


def install(directory: Path, name: str, version: str) -> None:
    """What pip leaves of a distribution, without its code."""
    folder = directory / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_here_everything_required_is_in_range_and_imports():
    found = list(checkup.check_versions())
    assert {one.status for one in found} == {"ok"}
    assert {"python", "metamorph", "torch", "transformers", "pillow", "pyyaml"} <= {one.name for one in found}
    assert named(found, "torch").found == metadata.version("torch")


def test_a_library_out_of_range_or_broken_is_named_with_the_command_that_mends_it(tmp_path, monkeypatch):
    install(tmp_path, "jinja2", "2.11")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if its compiled part were missing
    found = list(checkup.check_versions())
    old, broken = named(found, "jinja2"), named(found, "tokenizers")
    assert (old.status, old.found, old.fix) == ("bad", "2.11, but >=3.1 is needed", 'python -m pip install "jinja2>=3.1"')
    assert broken.status == "bad" and "does not import" in broken.found and "--force-reinstall" in broken.fix
    assert not any("\n" in one.found for one in found)


def test_torchvision_beside_a_cpu_build_is_to_be_uninstalled(tmp_path, monkeypatch):
    install(tmp_path, "torchvision", "0.28.0")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    found = named(checkup.check_versions(), "torchvision")
    assert (found.status, found.fix) == ("bad", "python -m pip uninstall torchvision")
    assert "nms does not exist" in found.found


@pytest.mark.parametrize(
    ("extension", "status"),
    [("", "note"), ("def _has_ops():\n    return True", "note"), ("def _has_ops():\n    return False", "bad")],
)
def test_a_torchvision_that_imports_is_judged_by_its_operators_and_not_by_the_name_of_its_version(tmp_path, monkeypatch, extension, status):
    install(tmp_path, "torchvision", "0.28.0")  # as on a Mac, on Windows and on ARM: no +cpu
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "extension.py").write_text(extension)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = checkup._torchvision()
    finally:
        for name in ("torchvision", "torchvision.extension"):
            sys.modules.pop(name, None)
    assert (found.status, bool(found.fix)) == (status, status == "bad")


def test_an_extra_that_is_not_installed_is_optional_and_a_broken_one_is_bad(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = list(checkup.check_extras())
    assert named(found, "decoder").status == "bad"
    assert named(found, "decoder").fix.startswith('python -m pip install "diffusers')
    assert "dev" not in {one.name for one in found}
    from packaging.requirements import Requirement

    absent = checkup._library(Requirement("a-library-that-nobody-wrote>=2,<3"), "extras", optional=True)
    assert (absent.status, absent.fix) == ("optional", 'python -m pip install "a-library-that-nobody-wrote<3,>=2"')


def test_only_what_is_wrong_is_marked_no(monkeypatch, capsys):
    """As where the package was installed without extras."""
    real = metadata.version

    def version(name: str) -> str:
        if name in ("diffusers", "peft", "matplotlib"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = [*checkup.check_versions(), *checkup.check_extras(), checkup._drawing()]
    found += list(checkup.check_uses(found))
    assert {named(found, name).status for name in ("decoder", "peft", "reporting", "drawing", GENERATE, "metamorph demo")} == {"optional"}
    assert named(found, "LoRA (peft)").status == named(found, "train a decoder").status == "optional"
    assert not [one for one in found if one.status == "bad"]
    assert not works(found)  # pictures cannot be generated, which the exit code says
    show(found)
    shown = capsys.readouterr().out
    assert "--" in shown and "NO" not in shown.split() and 'to add it: python -m pip install "diffusers' in shown


def test_more_threads_than_cores_is_noted():
    assert checkup._cores(1).status == "ok"
    crowded = checkup._cores(10_000)
    assert crowded.status == "note" and crowded.fix.startswith("export OMP_NUM_THREADS=")


def test_the_machine_has_memory_disk_and_a_device():
    found = list(checkup.check_machine())
    assert {"bfloat16", "cores", "memory", "disk"} < {one.name for one in found}
    total, free = checkup.memory()
    assert 0 < free <= total


def test_memory_that_a_system_does_not_tell_is_unknown_and_no_number(tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    total, free = checkup.memory(nowhere, nowhere)  # as on a Mac
    assert total > 0 and free is None
    monkeypatch.delattr(os, "sysconf")
    assert checkup.memory(nowhere, nowhere) == (None, None)  # as on Windows
    for known, said in (((16 * 2**30, None), "16.0 GiB; "), ((None, None), "an unknown amount; ")):
        finding = checkup._memory(*known)
        assert (finding.status, finding.found) == ("ok", f"{said}how much is free is unknown here")
    assert checkup._memory(16 * 2**30, 2**30).status == "note"
    (tmp_path / "memory.max").write_text("1000")
    (tmp_path / "memory.current").write_text("400")
    assert checkup.memory(nowhere, tmp_path) == (1000, 600)  # a container's own limit


@pytest.mark.parametrize(
    ("environment", "expected"), [({"HF_HUB_OFFLINE": "1"}, "offline"), ({"HF_HUB_OFFLINE": "0"}, "not tried"), ({}, "not tried")]
)
def test_the_hub_is_judged_from_the_environment_without_a_network(monkeypatch, environment, expected):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert expected in named(checkup.check_hub(), "hub").found


def test_a_hub_that_does_not_answer_is_a_note(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of discard: nobody listens
    assert named(checkup.check_hub(ask=True), "hub").status == "note"


def test_without_the_shipped_weights_nothing_is_said_to_work(monkeypatch, tmp_path):
    from metamorph.microworld import components

    monkeypatch.setattr(components, "WEIGHTS", tmp_path)
    parts = list(checkup.check_parts())
    assert {one.status for one in parts} == {"bad"}
    uses = list(checkup.check_uses([*checkup.check_versions(), *checkup.check_extras(), *parts]))
    assert not works(uses)
    assert "package holds no parts" in named(uses, GENERATE).found
    assert named(uses, "train a decoder").status == "ok"


def test_a_check_that_breaks_off_is_a_finding():
    def check():
        yield Finding("parts", "llm", "ok", "fine")
        raise ComponentError("weights with hash a but the card says b.\nsecond line")

    first, last = checkup._guarded("parts", check)
    assert first.status == "ok"
    assert last.found == "broke off: ComponentError: weights with hash a but the card says b."


def test_the_memory_of_the_8b_model_is_what_the_dry_run_says():
    needs = checkup.memory_of_large_model()
    shown = CliRunner().invoke(app, ["train", "metamorph_llama3_1_8b", "--dry-run"])
    assert f"at most about {needs(1) / 2**30:,.1f} GiB" in shown.output
    assert needs(1) > needs(2) > needs(8)
    said = named(checkup.check_uses(list(checkup.check_versions())), "train an 8B model").found
    assert f"about {needs(1) / 2**30:.0f} GiB" in said


def test_command_prints_a_table_and_writes_json(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "new" / "doctor.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert report["works"] is True
    assert {one["group"] for one in report["findings"]} == {"versions", "extras", "machine", "parts", "uses"}
    for title in ("Required libraries", "This machine", "What will work here"):
        assert title in result.output
    assert "metamorph generate" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(("blocked", "fix"), [("transformers", "transformers"), ("diffusers", "diffusers"), ("torch", "torch")])
def test_in_a_broken_environment_it_leaves_with_1_a_fix_and_no_traceback(blocked, fix):
    code = f"import sys\nsys.modules[{blocked!r}] = None\nsys.argv = ['metamorph', 'doctor']\nfrom metamorph.cli.main import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert f'python -m pip install "{fix}' in result.stdout
    uses = result.stdout.partition("What will work here")[2]
    assert f'fix: python -m pip install "{fix}' in uses
