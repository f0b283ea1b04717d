"""Two processes, sharded, against one: the same losses from the same loop."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from metamorph.training.trackers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
SCRIPT = Path(__file__).with_name("training_script.py")


def launch(processes: int, run_dir: Path, *, steps: int = 12, resume: str = "new", poison: str = "clean") -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [str(SCRIPT), str(run_dir), str(steps), resume, "fast", poison]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False)


def losses(run_dir: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_two_processes_train_as_one_and_resume(tmp_path):
    for processes, name in ((1, "one"), (2, "two")):
        done = launch(processes, tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
    for key in ("text_loss", "visual_loss", "loss", "grad_norm"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=2e-4)
    died = launch(2, tmp_path / "cut", poison="10")
    assert died.returncode != 0
    shards = list((tmp_path / "cut/checkpoints/train/step-00000008").glob("*.safetensors"))
    assert len(shards) == 2
    alone = launch(1, tmp_path / "cut", resume="resume")
    assert "written by 2 processes but read by 1" in alone.stderr
    resumed = launch(2, tmp_path / "cut", resume="resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for key in ("text_loss", "visual_loss", "grad_norm"):
        assert losses(tmp_path / "cut", key) == losses(tmp_path / "two", key)  # bit for bit


def test_a_non_finite_loss_on_one_process_stops_all(tmp_path):
    done = launch(2, tmp_path, poison="3")
    assert done.returncode != 0
    assert "visual loss" in done.stderr and "row11" in done.stderr and "step 3" in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
