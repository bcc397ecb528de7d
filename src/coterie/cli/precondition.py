"""`coterie precondition`: coordinates for private training, from public text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import progress, say, table, write_json


def command(
    settings: Annotated[
        Path, typer.Argument(help="train.yaml or party.yaml, whose run or federation has `privacy.preconditioner`.")
    ],
    text: Annotated[list[Path], typer.Option("--text", help="Public text, in the form of the run's own.")],
    records: Annotated[int, typer.Option("--records", min=1, help="Most records to measure.")] = 600,
    power: Annotated[
        float, typer.Option("--power", min=0.0, max=0.5, help="0 changes nothing; 0.5 makes gradients even.")
    ] = 0.125,
    damping: Annotated[
        float, typer.Option("--damping", min=1e-6, help="Added to every second moment, relative to their mean.")
    ] = 0.1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Measure in which directions gradients are long, on public text, and write the file that the settings name.

    Private training in these coordinates learns more from the same budget: noise is equally strong everywhere, and
    gradients then are nearly so. Whatever the text holds can be read from the file: take none that is private.

    Example:
        coterie precondition train.yaml --text public.jsonl
        coterie train train.yaml

        coterie precondition party.yaml --text public.jsonl
        coterie split --federation federation.yaml --out parts
    """
    from coterie.training.single.preconditioned import PublicRecords, place_of, settings_for

    config = settings_for(settings)
    place = place_of(config)
    public = PublicRecords.of(config, text, records)
    with progress("records", len(public.drawn)) as advance:
        found = public.preconditioner(power, damping, advance)
    found.save(place)
    values = sum(value.numel() for value in found.tensors().values())
    figures = {"records": len(public.drawn), "modules": len(found.factors), "values": values, "file": str(place)}
    if json_file is not None:
        write_json(json_file, figures)
    table(("records", "modules", "values"), [(len(public.drawn), len(found.factors), f"{values:,}")])
    say(f"written to {place}")
