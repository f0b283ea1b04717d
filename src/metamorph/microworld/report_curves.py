"""Loss curves of a run, and the band in which those of the same recipe are expected to lie."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.errors import DataError
from metamorph.reporting.blocks import Block, Figure, Note
from metamorph.reporting.plots import Band, Curve, line_plot, smooth

EXPECTED = Path(__file__).parent / "expected" / "demo.json"
LOSSES = {"text_loss": "text: cross-entropy of the next token", "visual_loss": "visual: minus the cosine of the next visual token"}
WINDOW = 5  # logged steps over which losses are averaged, in curves and in the band
MARGIN = 0.03  # the band's half width is at least this share of the loss's whole range
Rows = Sequence[Mapping[str, Any]]
Series = dict[str, dict[str, tuple[list[int], list[float]]]]


def loss_series(rows: Rows) -> Series:
    """stage -> loss -> (steps, smoothed values); a loss that a stage does not have is absent."""
    found: Series = {}
    for row in rows:
        for name in LOSSES if "evaluation" not in row else ():
            value = row.get(name)
            if value is not None and math.isfinite(value):
                steps, values = found.setdefault(row["stage"], {}).setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {stage: {name: (x, smooth(y, WINDOW)) for name, (x, y) in losses.items()} for stage, losses in found.items()}


def expected_band(runs: Sequence[Rows]) -> dict[str, Any]:
    """The band from several runs of one recipe with different seeds: mean +- 3 standard deviations, at least `MARGIN` of the range.

    Raises:
        DataError: fewer than two runs, or runs that logged different steps.
    """
    if len(runs) < 2:
        raise DataError(f"{len(runs)} run(s) but at least 2 are needed for a band. Train the recipe with several seeds.")
    series = [loss_series(rows) for rows in runs]
    stages: dict[str, Any] = {}
    for stage, losses in series[0].items():
        for name, (steps, _) in losses.items():
            others = [one.get(stage, {}).get(name, ([], []))[0] for one in series]
            if any(other != steps for other in others):
                raise DataError(f"{name} of stage {stage!r} logged at different steps but the same are needed. Use runs of one recipe.")
            values = np.array([one[stage][name][1] for one in series])
            half = np.maximum(3 * values.std(0, ddof=1), MARGIN * float(np.ptp(values)))
            low, high = values.mean(0) - half, values.mean(0) + half
            stages.setdefault(stage, {})[name] = {"step": steps, "low": low.round(4).tolist(), "high": high.round(4).tolist()}
    return {"runs": len(runs), "smoothed_over": WINDOW, "stages": stages}


def read_band(path: Path = EXPECTED) -> dict[str, Any] | None:
    """The stored band, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def share_in_band(rows: Rows, band: Mapping[str, Any] | None) -> dict[str, float]:
    """For each stage and loss ("vpit/text_loss"), the share of points inside the band; only where the steps are the band's."""
    found = {}
    for stage, losses in loss_series(rows).items():
        for name, (steps, values) in losses.items():
            expected = ((band or {}).get("stages", {}).get(stage) or {}).get(name)
            if expected is not None and expected["step"] == steps:
                inside = [low <= value <= high for low, value, high in zip(expected["low"], values, expected["high"], strict=True)]
                found[f"{stage}/{name}"] = float(np.mean(inside))
    return found


def curve_blocks(rows: Rows, band: Mapping[str, Any] | None) -> list[Block]:
    """A plot for each loss over all stages, with the band where it was made for these steps."""
    series = loss_series(rows)
    fits = share_in_band(rows, band)
    blocks: list[Block] = []
    for loss, words in LOSSES.items():
        curves, offset, edges = [], 0, ([], [], [])
        for stage, losses in series.items():
            steps, values = losses.get(loss, ([], []))
            if steps:
                curves.append(Curve(f"stage {stage}", [offset + step for step in steps], values))
            if f"{stage}/{loss}" in fits:
                assert band is not None  # it has a share inside
                expected = band["stages"][stage][loss]
                gap = ([offset + steps[0]], [math.nan], [math.nan]) if edges[0] else ([], [], [])
                new = ([offset + step for step in expected["step"]], expected["low"], expected["high"])
                for edge, before, more in zip(edges, gap, new, strict=True):
                    edge += [*before, *more]
            offset += max((x[-1] for x, _ in losses.values()), default=0)
        if curves:
            drawn = Band(*edges) if edges[0] else None
            caption = f"{words}, mean of {WINDOW} logged steps. Grey: where runs of this recipe are expected." if drawn else words
            blocks.append(Figure(line_plot(curves, band=drawn, title=words.partition(":")[0] + " loss"), caption))
    if not fits:
        blocks.append(Note("No expected band is stored for a run of these steps, so none is drawn."))
    return blocks
