"""The losses of a step by source: what each source's targets cost, over all micro-batches and processes.

They are taken from the values that the step's own losses added up, so that nothing is computed twice and nothing else changes. The means,
weighted by the numbers of targets, give the loss of the kind (with `normalization="global"`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from metamorph.training.stepping import SharedCounts, StepPart, TrainingBatch, gather_objects

MAX_SOURCES = 50
"""With more sources than these there are no curves by source: each would be a column of the metrics."""
_log = logging.getLogger(__name__)
Sums = dict[tuple[str, str], tuple[float, int]]
"""(kind, source) -> sum over targets, number of targets."""


class SourceLosses:
    """Follows a run: names of sources as they appear, and the losses of single steps."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._told = False

    def of_step(self, parts: Sequence[StepPart], micro_batches: Sequence[TrainingBatch], shared: SharedCounts) -> dict[str, float | int]:
        """`loss/<kind>/<source>`, the mean over the source's targets, and `targets/<kind>/<source>`, their number; all ranks call it.

        Empty until a second source has appeared. A source without targets in the step is left out.
        """
        everyone = gather_objects(_sums(parts, shared.padded(micro_batches)))
        total: Sums = {}
        for own in everyone:
            for key, (value, count) in own.items():
                before = total.get(key, (0.0, 0))
                total[key] = (before[0] + value, before[1] + count)
        self._names |= {source for _, source in total}
        if not 1 < len(self._names) <= MAX_SOURCES:
            self._tell_limit()
            return {}
        means = {f"loss/{kind}/{source}": value / count for (kind, source), (value, count) in sorted(total.items())}
        return means | {f"targets/{kind}/{source}": count for (kind, source), (_, count) in sorted(total.items())}

    def _tell_limit(self) -> None:
        if len(self._names) > MAX_SOURCES and not self._told:
            self._told = True
            _log.warning("%d sources but at most %d have losses of their own in the metrics", len(self._names), MAX_SOURCES)


class ShortenedRows:
    """Counts the rows that lost turns to the limit of length, from one logged step to the next."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, micro_batches: Sequence[Any]) -> None:
        """Those of one step of this process."""
        for batch in micro_batches:
            turns_cut: Sequence[int] = getattr(batch, "turns_cut", ())
            self._counts.update(batch.sources[number] for number, turns in enumerate(turns_cut) if turns)

    def take(self) -> dict[str, int]:
        """`shortened_rows/<source>` over all processes since the last call; all ranks call it. A source without any is left out."""
        everyone = gather_objects(dict(self._counts))
        self._counts.clear()
        total = sum(map(Counter, everyone), Counter())
        return {f"shortened_rows/{source}": count for source, count in sorted(total.items())}


def _sums(parts: Sequence[StepPart], batches: Sequence[tuple[TrainingBatch, bool]]) -> Sums:
    """This process's share."""
    sums: Sums = {}
    for part, (batch, counted) in zip(parts, batches, strict=True):
        for kind, source, value, count in _by_source(part, batch) if counted else ():
            before = sums.get((kind, source), (0.0, 0))
            sums[kind, source] = (before[0] + value, before[1] + count)
    return sums


def _by_source(part: StepPart, batch: Any) -> Iterator[tuple[str, str, float, int]]:
    """(kind, source, sum, number of targets) of a micro-batch that knows its documents' sources."""
    sources: Sequence[str] = getattr(batch, "sources", ())
    if not sources or not hasattr(batch, "documents_of_targets"):
        return
    names = sorted(set(sources))
    of_documents = torch.tensor([names.index(source) for source in sources])
    documents: Mapping[str, torch.Tensor] = batch.documents_of_targets()
    for kind, values in part.per_target.items():
        if values is None or kind not in documents:
            continue
        groups = of_documents[documents[kind]]
        sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, groups, values.double().cpu())
        counts = torch.bincount(groups, minlength=len(names))
        yield from ((kind, names[i], float(sums[i]), int(counts[i])) for i in counts.nonzero().flatten().tolist())
