"""What is shipped: a wheel with the code and every data file beside it, which works in an environment of its own, and a source archive."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import metamorph

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def tracked(*paths: str) -> list[str]:
    return [name for name in run("git", "ls-files", *paths, cwd=ROOT).stdout.split() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("metamorph-*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel installed, and an empty directory `work` beside it.

    The libraries that the wheel requires are those of the running environment, put behind the new environment's own path: to install
    them once more would download two gigabytes. The running environment's metamorph is an editable install, found through a .pth
    file that only its own interpreter reads.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "env", with_pip=False, symlinks=os.name != "nt")
    python = root / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=root)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=root).stdout.strip()
    libraries = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (Path(site) / "libraries-of-the-tests.pth").write_text("\n".join(sorted(libraries)) + "\n", encoding="utf-8")
    (root / "work").mkdir()
    return root


@pytest.fixture(scope="module")
def clean(elsewhere) -> dict[str, str]:
    """No variable points into the checkout, and nothing of a user's home is read."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ}
    return {**kept, "HOME": str(elsewhere / "work"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_wheel_holds_every_tracked_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {name.removeprefix("src/") for name in tracked("src/metamorph")} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not {name for name in held if name.startswith("tests")}


def test_wheel_works_outside_the_checkout(elsewhere, clean):
    work, command = elsewhere / "work", elsewhere / "env" / "bin" / "metamorph"
    code = "import importlib.metadata as m, metamorph; print(metamorph.__file__, m.distribution('metamorph').locate_file(''), sep='\\n')"
    for place in run(elsewhere / "env" / "bin" / "python", "-c", code, cwd=work, env=clean).stdout.splitlines():
        assert Path(place).resolve().is_relative_to((elsewhere / "env").resolve()), place
    assert run(command, "--version", cwd=work, env=clean).stdout == f"metamorph {metamorph.__version__}\n"

    run(command, "generate", "a small red star at the top left", "-o", "star.png", cwd=work, env=clean)
    from PIL import Image

    from metamorph.microworld.reader import read_scene
    from metamorph.provenance import read

    with Image.open(work / "star.png") as image:
        scene = read_scene(image.convert("RGB")).scene
    assert scene is not None
    assert [(thing.size, thing.colour, thing.shape, thing.cell) for thing in scene.objects] == [("small", "red", "star", 0)]
    origin = read(work / "star.png")
    assert origin is not None and origin.model is not None and (origin.model.name, origin.model.of) == ("metamorph", "weights")

    told = run(command, "doctor", cwd=work, env=clean).stdout
    assert "What will work here" in told and str(elsewhere / "env") in told.replace("\n", "").replace(" ", "")
    assert [entry.name for entry in work.iterdir() if not entry.name.startswith(".")] == ["star.png"]


def test_source_archive_holds_what_make_check_needs(tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (built,) = tmp_path.glob("metamorph-*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = "src tests docs benchmarks Makefile pyproject.toml constraints.txt .importlinter README.md LICENSE".split()
    missing = set(tracked(*needed)) - held
    assert not missing, sorted(missing)
