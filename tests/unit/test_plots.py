"""Plots: valid, self-contained SVG that reads on light and dark pages."""

import re
from xml.etree import ElementTree

import pytest

from metamorph.errors import DataError
from metamorph.reporting.blocks import Figure
from metamorph.reporting.plots import INK, Band, Bar, Curve, bar_plot, line_plot, smooth
from metamorph.reporting.tables import Interval


@pytest.fixture(scope="module")
def losses() -> str:
    band = Band([0, 10, 20], [2.0, 1.0, 0.5], [3.0, 2.0, 1.0], label="earlier runs")
    curves = [Curve("text", [0, 10, 20], [2.5, 1.5, 0.7]), Curve("visual <1>", [0, 10, 20], [-0.1, float("nan"), -0.8])]
    return line_plot(curves, band=band, title="loss & co", y_label="nats")


def test_plot_is_one_svg_with_its_words(losses: str):
    root = ElementTree.fromstring(losses)
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    for word in ("loss & co", "nats", "step", "text", "visual <1>", "earlier runs"):
        assert word in text


def test_plot_takes_the_colour_of_its_page_and_loads_nothing(losses: str):
    assert INK not in losses
    assert "currentColor" in losses
    assert not re.search(r"https?://(?!www\.w3\.org/)", losses)
    Figure(losses)  # accepted as a figure: runs and loads nothing


def test_same_input_same_bytes_and_ids_never_collide(losses: str):
    first, again = (line_plot([Curve("a", [0, 1], [1, 0])]) for _ in range(2))
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, losses)]
    assert not ids[0] & ids[1]
    for svg, known in zip((first, losses), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= known


def test_bars_show_intervals_and_references():
    bars = [Bar("colour", Interval(0.9, 0.85, 0.94, 500), {"blind": 0.2}), Bar("shape", Interval(0.4), {"blind": 0.15, "floor": 0.5})]
    text = " ".join(ElementTree.fromstring(bar_plot(bars, title="by type")).itertext())
    for word in ("colour", "shape", "blind", "floor", "by type"):
        assert word in text


def test_lengths_that_differ_are_refused_with_both():
    with pytest.raises(DataError, match=r"2 and 3 values .* \('a'\)"):
        line_plot([Curve("a", [0, 1], [1, 2, 3])])
    with pytest.raises(DataError, match="expected"):
        line_plot([Curve("a", [0, 1], [1, 2])], band=Band([0, 1], [0], [1, 1]))


def test_smoothing_is_a_running_mean():
    assert smooth([4.0, 2.0, 0.0, 0.0], 2) == [4.0, 3.0, 1.0, 0.0]
    assert smooth([], 3) == []
    with pytest.raises(DataError, match="0 values but at least 1"):
        smooth([1.0], 0)
