"""What is shipped: a wheel built from the tree holds the code and every data file beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_holds_every_tracked_file_of_the_package(tmp_path):
    tracked = subprocess.run(["git", "ls-files", "src/metamorph"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("metamorph-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {name.removeprefix("src/") for name in tracked if (ROOT / name).is_file()}
    assert expected <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not {name for name in held if name.startswith("tests")}
