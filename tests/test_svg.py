"""Ticks, escapes, and where a chart puts its points."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.report import Chart, element, text, ticks


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low, span):
    high = low + span
    if high - low < 1e-9 * abs(high):
        return
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


def test_ticks_by_hand():
    assert ticks(0.03, 0.61) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(5, 5) == [5]


def test_what_the_user_named_cannot_break_the_markup():
    svg = element("svg", text(1, 2.34567, 'a < b & "c"', class_='"><script>'), viewBox="0 0 1 1", aria_label=None)
    (words,) = ElementTree.fromstring(svg)
    assert words.text == 'a < b & "c"' and words.attrib == {"x": "1", "y": "2.35", "class": '"><script>'}


def test_a_chart_holds_its_points():
    chart = Chart([10, 20], [-1, 1], "cost", "AP", width=500, height=300)
    chart.points([(10, -1), (20, 1)], "each")
    chart.steps([(10, -1), (20, 1)], "front")
    svg = ElementTree.fromstring(chart.draw("a chart"))
    (x1, y1), (x2, y2) = ((float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle"))
    assert chart.LEFT < x1 < x2 < 500 - chart.RIGHT and chart.TOP < y2 < y1 < 300 - chart.BOTTOM
    (line,) = svg.iter("polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert corners[:3] == [(x1, y1), (x2, y1), (x2, y2)]
    assert corners[3] == (500 - chart.RIGHT, y2)  # the last one holds to the edge
    assert {"cost", "AP"} <= {t.text for t in svg.iter("text")}


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0]])
def test_a_chart_of_nothing_much_is_still_a_chart(values):
    chart = Chart(values, values, "x", "y")
    chart.points(zip(values, values, strict=True), "each")
    ElementTree.fromstring(chart.draw("empty"))
