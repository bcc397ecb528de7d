"""`coterie demo`: a federation on this machine, from nothing to a report."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import console, say, table, write_json


def command(
    parties: Annotated[int, typer.Option(help="Organisations that take part, 2 to 6.")] = 3,
    rounds: Annotated[int | None, typer.Option(help="Rounds; default 48, of private arms 6.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Run folder; an earlier demo in it is replaced.")] = Path(
        "coterie-demo"
    ),
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What to compare, separated by commas: public, isolated, tokens, experts, centralised, isolated_dp, "
            "experts_dp, experts_dp_shared, centralised_dp; default: all (the last but one from 3 parties on).",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny demo of every step, in a minute; its losses show nothing.")
    ] = False,
) -> None:
    """Train a small model with several parties on this machine, as real processes with real mutual TLS.

    No network, no download, no GPU. The text is the documentation inside this Python installation. Afterwards
    nothing keeps running, and the folder has everything to run any part again by hand.

    Example:
        coterie demo --parties 3 --json demo.json
    """
    from coterie.cli.timed_screen import TimedScreen
    from coterie.demonstration.demo import AUDIT, REPORT, run_demo
    from coterie.demonstration.plan import make_plan

    chosen = None if arms is None else [name.strip() for name in arms.split(",") if name.strip()]
    plan = make_plan(parties, rounds, chosen, quick=quick)
    screen = TimedScreen()
    screen.line(f"coterie demo: {parties} parties, this machine only")
    results = run_demo(plan, folder, screen)

    from coterie.demonstration.tables import tables
    from coterie.demonstration.verdict import headline, meaning, not_protected

    say()
    console().print(headline(results), style="bold", markup=False)
    for shown in tables(results):
        say()
        table(shown.columns, shown.rows, title=shown.title)
    say()
    say("What this means")
    _bullets(meaning(results))
    warning = not_protected(results)
    if warning:
        say()
        say("What this does not protect")
        _bullets(warning)
    say()
    say(f"Report   {folder / REPORT}")
    if results.audit is not None:
        say(f"Audit    {folder / AUDIT} shows what other parties could read, and the figures behind it")
    say(f"By hand  {folder / 'README.txt'} has every command of this demo")
    if json_file is not None:
        write_json(json_file, results.as_json())


def _bullets(sentences: list[str]) -> None:
    width = min(100, console().width) if sys.stdout.isatty() else 100
    for sentence in sentences:
        say(textwrap.fill(sentence, width, initial_indent="- ", subsequent_indent="  "))
