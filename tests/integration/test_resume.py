"""A process killed at an arbitrary moment, and the run that goes on from what it left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metamorph.training.trackers import read_metrics

SCRIPT = Path(__file__).with_name("training_script.py")
STEPS = 40


def start(run_dir: Path, *, resume: str = "new", slow: str = "fast") -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(run_dir), str(STEPS), resume, slow, "clean"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def rows(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.multiprocess
def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path):
    whole = start(tmp_path / "whole")
    for attempt in range(2):  # killed twice
        process = start(tmp_path / "cut", resume="resume" if attempt else "new", slow="slow")
        reached = 10 + 12 * attempt
        while process.poll() is None and (not (found := rows(tmp_path / "cut")) or found[-1]["step"] < reached):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    finish(start(tmp_path / "cut", resume="resume"))
    finish(whole)
    assert len(rows(tmp_path / "whole")) == STEPS
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")  # bit for bit
