"""`coterie models`: which families can be trained, and why others cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the table as JSON: more fields, and the columns that --markdown would add.",
        ),
    ] = None,
    markdown_path: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the page docs/models.md. Files NAME.json in the folder FILE without its suffix add columns: "
            '{"title": ..., "cells": {family: figure}}.',
        ),
    ] = None,
) -> None:
    """List the Mixture-of-Experts families that the installed transformers offers and coterie trains.

    Example:
      coterie models
      coterie models --json models.json
    """
    from coterie.cli import output
    from coterie.models.zoo import families

    if json_path is not None:
        outside = [{"name": item.name, "reason": item.reason} for item in families.excluded_families()]
        output.write_json(
            json_path,
            {"families": families.as_records(families.read_columns(json_path.with_suffix(""))), "excluded": outside},
        )
        output.say(f"wrote {json_path}")
    if markdown_path is not None:
        columns = families.read_columns(markdown_path.with_suffix(""))
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(families.markdown(columns), encoding="utf-8")
        output.say(f"wrote {markdown_path}")
    if json_path is None and markdown_path is None:
        header, rows = families.table_rows()
        output.table(header, rows, title="families that coterie trains")
        output.say()
        excluded = [[item.name, item.reason] for item in families.excluded_families()]
        output.table(["family", "why it stays out"], excluded)
