"""Metrics and their intervals, and the runner that collects them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from metamorph.errors import ConfigError
from metamorph.evaluation.metrics import Metric, difference_of_means, majority_share, mean, proportion, ratio_of_exponentials
from metamorph.evaluation.runner import evaluate
from metamorph.evaluation.tasks import Task


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20 by the score method without continuity correction.
    metric = proportion([True] * 81 + [False] * 182)
    assert (round(metric.low, 4), round(metric.high, 4)) == (0.2553, 0.3662)
    nothing = proportion([False] * 20)
    assert nothing.low == 0
    assert round(nothing.high, 4) == 0.1611


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        metric = mean(rng.normal(3, 1, 80).tolist(), seed=trial, draws=300)
        covered += metric.low <= 3 <= metric.high
    assert 178 <= covered <= 200


def test_a_perplexity_ratio_is_paired() -> None:
    before = np.random.default_rng(1).normal(2, 1, 200)
    metric = ratio_of_exponentials((before + math.log(1.5)).tolist(), before.tolist())
    assert metric.value == pytest.approx(1.5)
    assert metric.high - metric.low < 1e-9  # every text got worse by the same factor: nothing is uncertain


def test_difference_and_majority() -> None:
    assert difference_of_means([True, True, False, True], [False, True, False, False]).value == 0.5
    assert majority_share(["a", "b", "a", "c"]) == 0.5


def test_no_observation_is_refused() -> None:
    with pytest.raises(ValueError, match="0 observations"):
        proportion([])
    with pytest.raises(ValueError, match="0 observations"):
        mean([])


def test_the_runner_keeps_all_metrics_and_refuses_two_of_one_name(tmp_path: Path) -> None:
    tasks = [Task("one", lambda subject, samples, seed: {"a": Metric(subject, 0, 1, samples)}, 5)]
    results = evaluate(tasks, 0.5, samples={"one": 7})
    results.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["a"] == {"value": 0.5, "low": 0, "high": 1, "n": 7}
    with pytest.raises(ConfigError, match="another task reports it too"):
        evaluate([*tasks, Task("two", tasks[0].run, 1)], 0.5)
