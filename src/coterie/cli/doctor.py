"""`coterie doctor`: whether a party could start, and what to mend first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, table, write_json


def command(
    settings: Annotated[Path, typer.Argument(help="This party's party.yaml.")],
    listen: Annotated[
        str | None, typer.Option(help="Address to listen on, where it differs from the agreed endpoint.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
) -> None:
    """Look at everything a party needs before it starts.

    That is: settings, certificate, clock, roster, placement, trunk, shard, text, its own port, everybody's endpoints.
    Nothing is trained, sent or changed. Exit code 1 if something is bad.

    Example:
        coterie doctor party.yaml
    """
    from coterie.training.party.doctor import diagnose

    findings = diagnose(settings, listen=listen)
    table(("check", "state", "found"), [(each.check, each.state, each.found) for each in findings])
    for each in findings:
        if each.fix:
            say(f"{each.check}: {each.fix}" + (f" (coterie explain {each.code})" if each.state == "bad" else ""))
    bad = [each.check for each in findings if each.state == "bad"]
    if json_file is not None:
        write_json(json_file, {"ok": not bad, "findings": [each.as_json() for each in findings]})
    if bad:
        raise typer.Exit(1)
