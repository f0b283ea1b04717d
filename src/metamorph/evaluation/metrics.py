"""Numbers with what is needed to believe them: value, 95% interval, and how many observations they rest on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

_Z = 1.959963984540054  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Metric:
    """A figure with its 95% interval and its number of observations."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain values, as reports store them."""
        return asdict(self)


Metrics = Mapping[str, Metric]


def proportion(successes: Sequence[bool]) -> Metric:
    """A share of successes with Wilson's score interval, which holds near 0 and 1 too.

    Raises:
        ValueError: there is no observation.
    """
    n = len(successes)
    if n == 0:
        raise ValueError("0 observations but a proportion needs at least 1. Raise the number of samples.")
    p = sum(bool(one) for one in successes) / n
    centre, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return Metric(p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), n)


def mean(values: Sequence[float], seed: int = 0, draws: int = 1000) -> Metric:
    """A mean with its bootstrap percentile interval.

    Raises:
        ValueError: there is no observation.
    """
    observed = np.asarray(values, dtype=np.float64)
    if observed.size == 0:
        raise ValueError("0 observations but a mean needs at least 1. Raise the number of samples.")
    rng = np.random.default_rng(seed)
    resampled = observed[rng.integers(observed.size, size=(draws, observed.size))].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Metric(float(observed.mean()), float(low), float(high), int(observed.size))


def ratio_of_exponentials(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0, draws: int = 1000) -> Metric:
    """exp(mean a) / exp(mean b) over paired observations (perplexities of the same texts), with a paired bootstrap interval."""
    difference = np.asarray(numerator, dtype=np.float64) - np.asarray(denominator, dtype=np.float64)
    of_logs = mean(list(difference), seed, draws)
    return Metric(math.exp(of_logs.value), math.exp(of_logs.low), math.exp(of_logs.high), of_logs.n)


def majority_share(answers: Sequence[Hashable]) -> float:
    """How often always giving the commonest answer would be right."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def difference_of_means(values: Sequence[float], baseline: Sequence[float], seed: int = 0, draws: int = 1000) -> Metric:
    """Mean of paired differences with its bootstrap interval: by how much `values` beat `baseline` on the same items."""
    return mean([float(a) - float(b) for a, b in zip(values, baseline, strict=True)], seed, draws)
