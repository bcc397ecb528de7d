"""A page and its parts. Everything given is escaped; words between backticks become code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { --ink: #1d2530; --soft: #566270; --line: #d9dee4; --ground: #f4f6f8; --accent: #2e6f95;
  --alarm: #b3261e; --open: #a15c00; --held: #1f7a4d; --unknown: #566270; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: var(--ink);
  background: #fff; max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0; }
.verdict { font-size: 1.6rem; line-height: 1.28; font-weight: 650; margin: .35rem 0 1.1rem; text-wrap: pretty; }
.several { font-size: 1.3rem; margin: .35rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, ul { margin: .4rem 0 .9rem; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
a { color: var(--accent); }
.note { color: var(--soft); font-size: .92rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.card { border: 1px solid var(--line); border-left: 6px solid var(--unknown); border-radius: 4px;
  padding: .7rem 1rem .75rem; break-inside: avoid; }
.card b { display: block; font-size: .82rem; letter-spacing: .03em;
  text-transform: uppercase; color: var(--unknown); }
.card strong { display: block; font-weight: 600; margin: .1rem 0 .2rem; }
.card p { margin: 0; font-size: .95rem; }
.alarm { border-left-color: var(--alarm); } .alarm b { color: var(--alarm); }
.open { border-left-color: var(--open); } .open b { color: var(--open); }
.held { border-left-color: var(--held); } .held b { color: var(--held); }
.warning { border-left: 6px solid var(--alarm); background: #fbf1f0; padding: .7rem 1rem .5rem; margin: 1rem 0;
  break-inside: avoid; }
.warning h2 { margin: 0 0 .3rem; padding: 0; border: 0; font-size: 1.05rem; }
.wide { overflow-x: auto; margin: .4rem 0 1.2rem; }
table { border-collapse: collapse; min-width: min(100%, 36rem); font-size: .95rem; line-height: 1.4; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; font-size: .92rem; }
th, td { padding: .34rem 1rem .34rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th { font-weight: 600; white-space: nowrap; }
tr { break-inside: avoid; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .4rem 0 1rem;
  font-size: .95rem; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: .6rem 0 1.4rem; break-inside: avoid; }
figcaption { color: var(--soft); font-size: .92rem; margin-bottom: .35rem; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; }
figure img { max-width: 100%; height: auto; }
.legend { list-style: none; padding: 0; margin: .3rem 0 0; display: flex; flex-wrap: wrap; gap: .15rem 1.2rem;
  font-size: .9rem; }
.legend svg { display: inline-block; width: 2.2rem; height: .8rem; vertical-align: middle; margin-right: .35rem; }
.grid { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
code { background: var(--ground); padding: .05rem .3rem; border-radius: 3px; font-size: .92em;
  overflow-wrap: anywhere; }
pre { background: var(--ground); padding: .7rem .9rem; font-size: .82rem; line-height: 1.45; white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .9rem; margin-top: 2.4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
@media (max-width: 34rem) {
  body { padding: 1.1rem .9rem 2rem; } .verdict { font-size: 1.28rem; }
  .several { font-size: 1.12rem; } h2 { font-size: 1.1rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  table.stack, table.stack caption, table.stack tbody, table.stack tr, table.stack td { display: block; }
  table.stack thead { display: none; }
  table.stack tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  table.stack td { border: 0; padding: .1rem 0; }
  table.stack td[data-name]:not(:first-child)::before { content: attr(data-name) ": "; color: var(--soft); }
  table.stack td:first-child { font-weight: 600; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { font-size: 10.5pt; max-width: none; padding: 0;
    -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  table { font-size: 8.8pt; } td, th { padding: .25rem .45rem .25rem 0; } tr { break-inside: avoid; }
  td code { overflow-wrap: normal; background: none; padding: 0; }
  .wide { overflow: visible; } h2, h3 { break-after: avoid; } figure svg { max-width: 28rem; }
}
"""


_PERCENT = re.compile(r"(\d) %")


@dataclass(frozen=True)
class Table:
    """Rows under column names, for screen and page."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(
    title: str, verdict: Sequence[str], parts: Iterable[str], *, footer: str, refresh_s: int | None = None
) -> str:
    """A whole HTML file that opens on its verdict.

    Args:
        title: of the file and the small line above the verdict.
        verdict: a sentence, or one for each subject.
        parts: what the functions below made.
        footer: plain words.
        refresh_s: the browser asks for it again after so many seconds.
    """
    again = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    size = "verdict" if len(verdict) == 1 else "verdict several"
    opening = f"<h1>{text(title)}</h1>" + "".join(f'<p class="{size}">{text(sentence)}</p>' for sentence in verdict)
    body = f"{opening}{''.join(parts)}<footer>{text(footer)}</footer>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def text(words: str) -> str:
    """Escaped, with `words` between backticks as code; a number keeps its percent sign on its line."""
    pieces = _PERCENT.sub("\\1\u00a0%", escape(words)).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing when that is empty."""
    inner = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{inner}</section>" if inner else ""


def paragraph(words: str, *, note: bool = False) -> str:
    """One paragraph; a note is in softer ink."""
    return f'<p class="note">{text(words)}</p>' if note else f"<p>{text(words)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """A list; nothing when there is no sentence."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def link(to: str, words: str) -> str:
    """A paragraph that leads to a file beside the page."""
    return f'<p><a href="{escape(to)}">{text(words)}</a></p>'


def preformatted(words: str) -> str:
    """Lines as they are; wider ones are wrapped."""
    return f"<pre>{escape(words)}</pre>"


def warning(title: str, sentences: Iterable[str]) -> str:
    """A red box; nothing when there is no sentence."""
    inner = bullets(sentences)
    return f'<div class="warning"><h2>{text(title)}</h2>{inner}</div>' if inner else ""


def card(kind: str, label: str, title: str, words: str) -> str:
    """A box with its outcome written out, so that it is not told by colour alone.

    Args:
        kind: ``alarm``, ``open``, ``held`` or ``unknown``.
        label: the outcome.
        title: of whom.
        words: in a sentence or two.
    """
    inner = f"<b>{text(label)}</b><strong>{text(title)}</strong><p>{text(words)}</p>"
    return f'<div class="card {escape(kind)}">{inner}</div>'


def cards(some: Iterable[str]) -> str:
    """Cards beside each other, as many as there is room for."""
    return f'<div class="cards">{"".join(some)}</div>'


def beside(*parts: str) -> str:
    """Figures beside each other where there is room, else one under the other."""
    return f'<div class="grid">{"".join(parts)}</div>'


def pairs(values: Mapping[str, str]) -> str:
    """Names and their values."""
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"


def table(shown: Table) -> str:
    """A table; on a narrow screen its rows are stacked. Nothing when it has no row."""
    if not shown.rows:
        return ""
    head = "".join(f"<th>{text(name)}</th>" for name in shown.columns)
    body = "".join("<tr>" + "".join(map(_cell, shown.columns, row)) + "</tr>" for row in shown.rows)
    inner = f"<caption>{text(shown.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="stack">{inner}</table></div>'


def _cell(name: str, value: str) -> str:
    named = f' data-name="{escape(name)}"' if name else ""
    return f"<td{named}>{text(value)}</td>"


def figure(caption: str, drawing: str) -> str:
    """A drawing under its caption."""
    return f"<figure><figcaption>{text(caption)}</figcaption>{drawing}</figure>"
