"""Drawings as SVG inside the page. Series differ by dash as well as by colour, and every figure has its words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle, islice

from coterie.pages.axes import Scale, shown, span

WIDTH = 440
"""Of every drawing, in its own units; 14 of them are the height of its letters, so that a phone can show it."""
_HEIGHT = 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 42
_STROKES = ("#2e6f95", "#c2452d", "#3a8a5f", "#7b5ea7", "#a06a00", "#5a6673")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4")
_INK, _SOFT = "#1d2530", "#566270"
_SMALL = 60
"""Up to this many points each is marked."""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        points: (x, y); a y that is not finite breaks the line.
        faint: for what others are compared with.
    """

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def lines(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines over a common axis, with a legend where there are several.

    Args:
        series: the lines.
        x: what the axis across counts.
        y: what the axis upwards counts.
        log: both axes are logarithmic; what lies under an end is put there.
        x_range: ends of the axis across; default: those of the values.
        y_range: ends of the axis upwards.
    """
    values = [point for one in series for point in one.points]
    across = Scale(*(x_range or span((a for a, _ in values), margin=0.02)), _LEFT, WIDTH - _RIGHT, log)
    up = Scale(*(y_range or span(b for _, b in values)), _HEIGHT - _BOTTOM, _TOP, log)
    drawn = [_frame(across, up, x, y)]
    looks = list(_looks(series))
    drawn += [_line(one, look, across, up) for one, look in zip(series, looks, strict=True)]
    names = ", ".join(one.name for one in series)
    return _svg(_HEIGHT, drawn, f"{y} over {x}: {names}") + (_legend(series, looks) if len(series) > 1 else "")


def heat_map(rows: Mapping[str, Mapping[int, float]], *, column: str) -> str:
    """Shares between 0 and 1 as fields, light to dark: a strip per row, a field per column number.

    Args:
        rows: by name, then by column.
        column: what a column is.
    """
    columns = sorted({number for values in rows.values() for number in values})
    if not columns:
        return ""
    step, field = 46, 22
    size = (WIDTH - 2) / len(columns)
    room = size >= 26
    drawn = []
    for index, (name, values) in enumerate(rows.items()):
        top = index * step
        drawn.append(_word(1, top + 13, name))
        for place, number in enumerate(columns):
            left = 1 + place * size
            share = values.get(number)
            drawn.append(_field(left, top + 17, size, field, share))
            if room and share is not None:
                ink = "#fff" if share > 0.55 else _INK
                drawn.append(_word(left + size / 2, top + 33, f"{share:.2f}", anchor="middle", fill=ink))
    foot = len(rows) * step + 10
    shown_columns = columns if room else [columns[0], columns[len(columns) // 2], columns[-1]]
    for number in shown_columns:
        place = columns.index(number)
        drawn.append(_word(1 + (place + 0.5) * size, foot + 2, f"{number}", anchor="middle", fill=_SOFT))
    drawn.append(_word(WIDTH / 2, foot + 19, column, anchor="middle", fill=_SOFT))
    return _svg(foot + 26, drawn, f"shares by {column}: {', '.join(rows)}")


def bars(
    values: Mapping[str, tuple[float, float, float] | None], *, x: str, rules: Mapping[str, float] | None = None
) -> str:
    """A bar per name for its share between 0 and 1, with its interval; a name without one says so.

    Args:
        values: (value, low, high of its interval).
        x: what is counted.
        rules: shares marked on every bar, by name.
    """
    step, foot = 42, len(values) * 42 + 8
    across = Scale(0.0, 1.0, 1, WIDTH - 8)
    drawn = []
    for tick in across.ticks():
        drawn.append(_rule(across.at(tick), 0, foot, "#e6eaee"))
        drawn.append(
            _word(across.at(tick), foot + 14, f"{100 * tick:.0f} %", anchor=_anchor(across, tick), fill=_SOFT)
        )
    for index, (name, found) in enumerate(values.items()):
        top = index * step
        told = "not measured" if found is None else f"{100 * found[0]:.1f} %"
        drawn.append(_word(1, top + 14, f"{name}: {told}"))
        if found is not None:
            drawn.append(_bar(across, top, *found))
            drawn += [_rule(across.at(share), top + 17, top + 35, _STROKES[1], 2) for share in (rules or {}).values()]
    for name, share in (rules or {}).items():
        words = f"{name} {100 * share:.1f} %"
        drawn.append(_word(across.at(share), foot + 46, words, anchor=_anchor(across, share), fill=_STROKES[1]))
    drawn.append(_word(WIDTH / 2, foot + 30, x, anchor="middle", fill=_SOFT))
    return _svg(foot + (52 if rules else 36), drawn, f"{x}: {', '.join(values)}")


def _bar(across: Scale, top: float, value: float, low: float, high: float) -> str:
    start, end, middle = across.at(0.0), across.at(value), top + 26
    whiskers = "".join(f"M{across.at(at):.1f} {middle - 5}v10" for at in (low, high))
    return (
        f'<rect x="{start:.1f}" y="{top + 19}" width="{end - start:.1f}" height="14" fill="{_STROKES[0]}"/>'
        f'<path d="M{across.at(low):.1f} {middle}H{across.at(high):.1f}{whiskers}" stroke="{_INK}" fill="none"/>'
    )


def marks(values: Mapping[str, float | None], *, x: str, high: float) -> str:
    """Single values on one axis from 0, each with its name on a line of its own."""
    step, foot = 34, len(values) * 34 + 6
    across = Scale(0.0, high, 8, WIDTH - 8)
    drawn = []
    for tick in across.ticks():
        drawn.append(_rule(across.at(tick), 0, foot, "#e6eaee"))
        drawn.append(_word(across.at(tick), foot + 15, shown(tick), anchor="middle", fill=_SOFT))
    for index, (name, value) in enumerate(values.items()):
        top = index * step
        told = "not measured" if value is None else f"{value:.2f}"
        drawn.append(_word(8, top + 14, f"{name}: {told}"))
        if value is not None:
            colour = _STROKES[index % len(_STROKES)]
            end = f"{across.at(value):.1f}"
            stem = f'<path d="M{across.at(0):.1f} {top + 24}H{end}" stroke="{colour}" stroke-width="3"/>'
            drawn.append(f'{stem}<circle cx="{end}" cy="{top + 24}" r="5" fill="{colour}"/>')
    drawn.append(_word(WIDTH / 2, foot + 31, x, anchor="middle", fill=_SOFT))
    return _svg(foot + 37, drawn, f"{x}: {', '.join(values)}")


@dataclass(frozen=True)
class _Look:
    stroke: str
    dash: str


def _looks(series: Sequence[Series]) -> Sequence[_Look]:
    plain = islice(cycle(zip(_STROKES, _DASHES, strict=True)), len(series))
    return [_Look("#98a2ad", "3 3") if one.faint else _Look(*look) for one, look in zip(series, plain, strict=True)]


def _frame(across: Scale, up: Scale, x: str, y: str) -> str:
    drawn = []
    for tick in up.ticks():
        drawn.append(f'<path d="M{across.start} {up.at(tick):.1f}H{across.end}" stroke="#e6eaee"/>')
        drawn.append(_word(across.start - 6, up.at(tick) + 4, shown(tick), anchor="end", fill=_SOFT))
    for tick in across.ticks():
        drawn.append(_word(across.at(tick), up.start + 16, shown(tick), anchor="middle", fill=_SOFT))
    drawn.append(f'<path d="M{across.start} {up.end}V{up.start}H{across.end}" stroke="#98a2ad" fill="none"/>')
    drawn.append(_word((across.start + across.end) / 2, up.start + 34, x, anchor="middle", fill=_SOFT))
    middle = (up.start + up.end) / 2
    drawn.append(
        f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle" fill="{_SOFT}">'
        f"{escape(y)}</text>"
    )
    return "".join(drawn)


def _line(one: Series, look: _Look, across: Scale, up: Scale) -> str:
    path, pen = [], "M"
    for a, b in one.points:
        if not math.isfinite(b):
            pen = "M"
            continue
        path.append(f"{pen}{across.at(a):.1f} {up.at(b):.1f}")
        pen = "L"
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    drawn = f'<path d="{"".join(path)}" fill="none" stroke="{look.stroke}" stroke-width="2"{dash}/>'
    if len(path) <= _SMALL and not one.faint:
        dots = (
            f'<circle cx="{across.at(a):.1f}" cy="{up.at(b):.1f}" r="2.6"/>'
            for a, b in one.points
            if math.isfinite(b)
        )
        drawn += f'<g fill="{look.stroke}">{"".join(dots)}</g>'
    return drawn


def _legend(series: Sequence[Series], looks: Sequence[_Look]) -> str:
    items = []
    for one, look in zip(series, looks, strict=True):
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        stroke = f'<path d="M0 5H34" stroke="{look.stroke}" stroke-width="2.5"{dash}/>'
        items.append(f'<li><svg viewBox="0 0 34 10" aria-hidden="true">{stroke}</svg>{escape(one.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _field(left: float, top: float, width: float, height: float, share: float | None) -> str:
    if share is None:
        return (
            f'<rect x="{left:.1f}" y="{top}" width="{width - 1:.1f}" height="{height}" fill="#fff" stroke="#d9dee4" '
            'stroke-dasharray="2 2"/>'
        )
    return f'<rect x="{left:.1f}" y="{top}" width="{width - 1:.1f}" height="{height}" fill="{_shade(share)}"/>'


def _shade(share: float) -> str:
    """From a light to a dark red; in grey it goes from light to dark as well."""
    part = min(max(share, 0.0), 1.0)
    ends = zip((0xFB, 0xEE, 0xE8), (0x8E, 0x1B, 0x12), strict=True)
    return "#" + "".join(f"{round(light + (dark - light) * part):02x}" for light, dark in ends)


def _rule(at: float, top: float, bottom: float, stroke: str, width: float = 1) -> str:
    return f'<path d="M{at:.1f} {top}V{bottom}" stroke="{stroke}" stroke-width="{width}"/>'


def _anchor(across: Scale, value: float) -> str:
    """Words near an end stay inside the drawing."""
    place = (across.at(value) - across.start) / (across.end - across.start)
    return "start" if place < 0.1 else "end" if place > 0.9 else "middle"


def _word(x: float, y: float, words: str, *, anchor: str = "start", fill: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def _svg(height: float, drawn: Sequence[str], description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}" font-size="14" '
        f'font-family="system-ui, sans-serif">{"".join(drawn)}</svg>'
    )
