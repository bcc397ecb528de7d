"""``report.html``: one page without anything from the network, which opens on its verdict and the picture."""

from __future__ import annotations

import base64
from pathlib import Path

from coterie import pages
from coterie.demonstration.plan import ARMS
from coterie.demonstration.results import Results
from coterie.demonstration.tables import tables
from coterie.demonstration.verdict import headline, meaning, not_protected
from coterie.pages import Table

_FOOTER = (
    "Everything is in this folder: settings, rosters, logs, metrics, checkpoints. README.txt has the commands to run "
    "any part again by hand; results.json has the figures."
)


def save_report(results: Results, wide: bytes, tall: bytes, path: Path) -> None:
    """Write the page; the picture becomes part of it, in a form for wide screens and one for narrow ones."""
    path.write_text(_page(results, _image(wide, tall)), encoding="utf-8")


def _image(wide: bytes, tall: bytes) -> str:
    def inline(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"

    return (
        f'<picture><source media="(max-width: 40rem)" srcset="{inline(tall)}">'
        f'<img alt="Held-out loss per party and arm, and its course over the rounds" src="{inline(wide)}"></picture>'
    )


def _audit(results: Results) -> str:
    if results.audit is None:
        return ""
    link = pages.link("audit.html", "The audit's page has every attack, its adversary and its figures.")
    return pages.section("What other parties could read", pages.bullets(results.audit.headline), link)


def _page(results: Results, image: str) -> str:
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
    return pages.page(
        f"coterie demo: {len(results.parties)} parties, {results.plan.rounds} rounds",
        [headline(results)],
        [
            pages.figure("losses of every arm", image),
            pages.warning("What this does not protect", not_protected(results)),
            _audit(results),
            pages.section("Figures", *map(pages.table, tables(results))),
            pages.section("What they mean", pages.bullets(meaning(results))),
            pages.section("How it was done", pages.table(subjects), pages.table(arms)),
        ],
        footer=_FOOTER,
    )
