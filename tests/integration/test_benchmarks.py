"""The benchmarks run, in a size that measures nothing, and the page of results is made from the results that are committed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def result(name: str, tmp_path: Path) -> dict:
    ended = run(f"{name}.py", "--quick", "--out", str(tmp_path / f"{name}.json"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["machine"]["torch"]
    assert f"{name}.py --quick" in content["command"]
    return content


def test_generation_benchmark_compares_equal_answers(tmp_path):
    rows = result("generation", tmp_path)["rows"]  # fails where the two sides say different things
    assert [row.get("images", row.get("batch")) for row in rows] == [16, 1, 2, 4]
    assert all(row["times_faster_than_last"] > 0 and row["all_step_speed_of_bare_forward"] > 0 for row in rows[1:])


@pytest.mark.parametrize(("name", "rows"), [("data", 2), ("images", 2), ("imports", 3), ("index", 4), ("packing", 2)])
def test_benchmark_runs(name, rows, tmp_path):
    assert len(result(name, tmp_path)["rows"]) == rows


def test_data_wait_is_read_from_a_log(tmp_path):
    seconds = [(1, 0.5, 1.0), (10, 0.0, 1.0), (20, 0.1, 1.0)]  # the tenth step stands for nine, the twentieth for ten
    logged = [{"step": step, "stage": "joint", "seconds": whole, "data_wait_seconds": wait} for step, wait, whole in seconds]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*logged, {"step": 20, "stage": "joint", "evaluation": 1}])))
    ended = run("data_wait.py", "--run", str(tmp_path), "--out", str(tmp_path / "wait.json"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    (row,) = json.loads((tmp_path / "wait.json").read_text())["rows"]
    assert row["share_waited"] == pytest.approx((0.5 + 10 * 0.1) / 20)


@pytest.mark.slow
def test_data_wait_is_measured_on_the_demo(tmp_path):
    assert [row["stage"] for row in result("data_wait", tmp_path)["rows"]] == ["projector", "vpit"]


def test_the_page_of_results_is_up_to_date():
    ended = run("table.py", "--check")
    assert ended.returncode == 0, ended.stderr
