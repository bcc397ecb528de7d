"""The look of every page that coterie writes: one HTML file, no script, nothing from a network.

`coterie.pages.page` has the page and its text, `coterie.pages.charts` the drawings (SVG inside the page) on the axes
of `coterie.pages.axes`; `coterie.pages.amounts` says how much, in the unit that a person would choose.
"""

from coterie.pages.charts import Series, bars, heat_map, lines, marks
from coterie.pages.page import (
    Table,
    beside,
    bullets,
    card,
    cards,
    figure,
    link,
    page,
    pairs,
    paragraph,
    preformatted,
    section,
    table,
    text,
    warning,
)

__all__ = [
    "Series",
    "Table",
    "bars",
    "beside",
    "bullets",
    "card",
    "cards",
    "figure",
    "heat_map",
    "lines",
    "link",
    "marks",
    "page",
    "pairs",
    "paragraph",
    "preformatted",
    "section",
    "table",
    "text",
    "warning",
]
