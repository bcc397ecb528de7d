"""Drawings put values where their axes say."""

from __future__ import annotations

import math
import re

import pytest

from coterie import pages
from coterie.pages import Series, Table
from coterie.pages.axes import Scale, shown, span


def test_a_linear_scale_is_linear_and_ends_where_it_ends() -> None:
    scale = Scale(0.0, 8.0, 100.0, 300.0)
    assert [scale.at(value) for value in (0.0, 2.0, 8.0, 9.0, -1.0)] == [100.0, 150.0, 300.0, 300.0, 100.0]
    assert scale.ticks() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_logarithmic_scale_gives_equal_room_to_equal_factors() -> None:
    scale = Scale(0.001, 1.0, 0.0, 300.0, log=True)
    assert [round(scale.at(value), 9) for value in (0.0, 0.001, 0.01, 0.1, 1.0)] == [0.0, 0.0, 100.0, 200.0, 300.0]
    assert scale.ticks() == pytest.approx([0.001, 0.01, 0.1, 1.0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.98, 4.51), (0.0, 4.0e9), (-0.2, 0.3), (7.0, 7.0001)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0.0, 1.0).ticks()
    assert 3 <= len(ticks) <= 8
    slack = 1e-9 * max(abs(low), abs(high))
    assert all(low - slack <= tick <= high + slack for tick in ticks)


def test_a_span_is_never_empty() -> None:
    for values in ([], [3.0], [0.0], [math.nan], [1.0, 2.0]):
        low, high = span(values)
        assert low < high


def test_ticks_are_short() -> None:
    told = [shown(v) for v in (0, 0.001, 2.5, 1000, 20_000, 3e6, 1e-5)]
    assert told == ["0", "0.001", "2.5", "1000", "20k", "3M", "1e-05"]


def test_a_line_breaks_where_there_is_no_value() -> None:
    drawn = pages.lines([Series("loss", [(0, 1.0), (1, math.nan), (2, 2.0), (3, 1.5)])], x="round", y="loss")
    path = re.search(r'<path d="([^"]+)" fill="none" stroke="#2e6f95"', drawn)
    assert path is not None
    assert re.sub(r"[\d. ]+", "", path[1]) == "MML"
    assert "nan" not in drawn


def test_a_field_without_a_value_is_left_empty() -> None:
    drawn = pages.heat_map({"reader": {0: 1.0, 2: 0.5}, "other": {1: 0.25}}, column="layer")
    assert len(re.findall("<rect", drawn)) == 6
    assert len(re.findall('fill="#fff" stroke', drawn)) == 3
    assert {"1.00", "0.50", "0.25"} <= set(re.findall(r">(\d\.\d\d)<", drawn))


def test_many_layers_are_drawn_without_their_figures() -> None:
    drawn = pages.heat_map({"reader": dict.fromkeys(range(48), 0.5)}, column="layer")
    assert len(re.findall("<rect", drawn)) == 48
    assert "0.50" not in drawn
    assert {"0", "24", "47"} <= set(re.findall(r">(\d+)<", drawn))


def test_a_bar_is_as_long_as_its_share() -> None:
    drawn = pages.bars({"a": (0.5, 0.4, 0.6), "b": (1.0, 0.9, 1.0), "c": None}, x="share")
    half, whole = (float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', drawn))
    assert half == pytest.approx(whole / 2, rel=1e-3)
    assert "c: not measured" in drawn


def test_a_page_without_figures_has_no_empty_parts() -> None:
    assert pages.section("Nothing") == pages.bullets([]) == pages.warning("Nothing", []) == ""
    assert pages.table(Table("none", ("a",), ())) == ""


def test_everything_shown_is_escaped() -> None:
    bad = "<i>&"
    made = [
        pages.paragraph(bad),
        pages.bullets([bad]),
        pages.table(Table(bad, (bad,), ((bad,),))),
        pages.pairs({bad: bad}),
        pages.card("held", bad, bad, bad),
        pages.lines([Series(bad, [(0, 0), (1, 1)])], x=bad, y=bad),
        pages.heat_map({bad: {0: 0.1}}, column=bad),
        pages.bars({bad: (0.1, 0, 0.2)}, x=bad, rules={bad: 0.5}),
        pages.marks({bad: 1.0}, x=bad, high=2.0),
        pages.page(bad, [bad], [], footer=bad),
    ]
    assert not [one for one in made if bad in one]
