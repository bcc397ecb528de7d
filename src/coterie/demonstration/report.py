"""``report.html``: one page without anything from the network, which opens on its verdict."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from coterie.demonstration.plan import ARMS
from coterie.demonstration.results import Results
from coterie.demonstration.tables import Table, tables
from coterie.demonstration.verdict import headline, meaning, not_protected

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.1rem; font-weight: 600; color: #555; margin: 0; }
.verdict { font-size: 1.7rem; line-height: 1.25; font-weight: 650; margin: .3rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.warning { border-left: 5px solid #d1495b; background: #fbf0f1; padding: .6rem 1rem; }
.warning h2 { margin-top: 0; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; min-width: 70%; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left;
  font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
code, pre { background: #f3f3f3; padding: .1rem .3rem; }
footer { color: #666; font-size: .9rem; margin-top: 2rem; }
"""


def save_report(results: Results, picture: Path, path: Path) -> None:
    """Write the page; the picture becomes part of it."""
    path.write_text(_page(results, picture.read_bytes()), encoding="utf-8")


def _page(results: Results, picture: bytes) -> str:
    image = base64.b64encode(picture).decode()
    warning = not_protected(results)
    arms = Table(
        "what each arm trains on in a round",
        ("arm", "trains on"),
        tuple((f"{ARMS[arm].title} ({arm})", ARMS[arm].sees) for arm in results.arms),
    )
    subjects = Table(
        "who has which text (from this Python installation)",
        ("party", "subject"),
        tuple((party, results.subjects[party]) for party in results.parties),
    )
    parts = [
        f"<h1>coterie demo: {len(results.parties)} parties, {results.plan.rounds} rounds</h1>",
        f'<p class="verdict">{_text(headline(results))}</p>',
        *([f'<div class="warning"><h2>What this does not protect</h2>{_list(warning)}</div>'] if warning else []),
        "<h2>Figures</h2>",
        *(_table(table) for table in tables(results)),
        f'<img alt="Held-out loss per party and arm, and its course over the rounds" '
        f'src="data:image/png;base64,{image}">',
        "<h2>What they mean</h2>",
        _list(meaning(results)),
        "<h2>How it was done</h2>",
        _table(subjects),
        _table(arms),
        "<footer>Everything is in this folder: settings, rosters, logs, metrics, checkpoints. README.txt has the "
        "commands to run any part again by hand; results.json has the figures.</footer>",
    ]
    head = f"<meta charset='utf-8'><title>coterie demo</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f"<table><caption>{_text(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _text(text: str) -> str:
    """Escaped, with `words` between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
